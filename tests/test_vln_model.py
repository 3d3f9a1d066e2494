"""The pre-training model: against others' layers, its losses, its caching, its folder."""

import re

import pytest
import torch
from tiny_vln import parity_line, tiny_batch, tiny_config, tiny_model

from vln.checkpoints import initialise_from_lxmert, to_released
from vln.model import Prevalent, PrevalentConfig, PrevalentPretraining


def test_the_original_is_reproduced(capsys):
    line = parity_line(capsys, "pretrain_tiny.npz")
    assert line.startswith("pass  vln/pretrain_tiny.npz  vln  163 of 163 arrays"), line


@pytest.fixture(scope="module")
def lxmert():
    from transformers import LxmertConfig, LxmertModel

    torch.manual_seed(3)
    config = LxmertConfig(
        vocab_size=40, hidden_size=16, num_attention_heads=2, intermediate_size=24, l_layers=2, x_layers=2,
        r_layers=1, max_position_embeddings=32, visual_feat_dim=10, initializer_range=0.3,
    )  # fmt: skip
    return LxmertModel(config).eval()


def test_layers_are_those_of_lxmert(lxmert):
    model = tiny_model(Prevalent)
    initialise_from_lxmert(model, lxmert.state_dict())
    ids, _, views = tiny_batch()
    mask = (ids != 0).float()
    blocked = ((1 - mask) * -1e4)[:, None, None]
    with torch.no_grad():
        text = lxmert.embeddings(ids, token_type_ids=torch.zeros_like(ids))
        for layer in lxmert.encoder.layer:
            text = layer(text, blocked)[0]
        torch.testing.assert_close(model.encode_text(ids), text, rtol=0, atol=2e-5)
        seen = model.embed_views(views)
        for layer in lxmert.encoder.x_layers:
            text, seen = layer(text, blocked, seen, None)[:2]
        torch.testing.assert_close(model(ids, views), text, rtol=0, atol=2e-5)


def test_sizes_of_the_paper():
    with torch.device("meta"):
        model = PrevalentPretraining(PrevalentConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 156_701_022
    assert len(model.state_dict()) + 1 == 331  # the released files repeat the word embeddings
    assert PrevalentConfig(action_target="view").num_actions == 37


def test_a_cached_text_is_exact_and_steps_differ():
    model = tiny_model()
    ids, _, views = tiny_batch()
    mask = ids != 0
    with torch.no_grad():
        text = model.encode_text(ids)
        found = [model.fuse(text, model.embed_views(seen), mask) for seen in (views, views.flip(1) + 1)]
        whole = [Prevalent.forward(model, ids, seen) for seen in (views, views.flip(1) + 1)]
    assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1])
    assert (found[0] - found[1]).abs().max() > 0.1


def test_rows_do_not_see_each_other_or_padding():
    model = tiny_model()
    ids, lengths, views = tiny_batch()
    with torch.no_grad():
        together = Prevalent.forward(model, ids, views)
        for row, length in enumerate(lengths):
            alone = Prevalent.forward(model, ids[row : row + 1, :length], views[row : row + 1])
            torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=2e-6)


def test_losses_are_means_over_what_was_chosen():
    model = tiny_model()
    ids, _, views = tiny_batch()
    labels = torch.full_like(ids, -1)
    labels[0, 1], labels[2, 0] = 9, 11
    actions = torch.tensor([3, -1, 0])
    with torch.no_grad():
        output = model(ids, views, mlm_labels=labels, action_labels=actions)
        sequence = Prevalent.forward(model, ids, views)
        words = model.mlm_logits(sequence).log_softmax(-1)
        moves = model.action_logits(sequence).log_softmax(-1)
    torch.testing.assert_close(output.mlm_loss, -(words[0, 1, 9] + words[2, 0, 11]) / 2)
    torch.testing.assert_close(output.action_loss, -(moves[0, 3] + moves[2, 0]) / 2)
    torch.testing.assert_close(output.loss, output.mlm_loss + output.action_loss)
    assert (int(output.mlm_count), int(output.action_count)) == (2, 2)
    best = int((words[0, 1].argmax() == 9).long() + (words[2, 0].argmax() == 11).long())
    assert int(output.mlm_correct) == best


def test_a_batch_without_anything_to_predict_costs_nothing():
    model = tiny_model()
    ids, _, views = tiny_batch()
    output = model(ids, views, mlm_labels=torch.full_like(ids, -1), action_labels=torch.tensor([-1, -1, -1]))
    assert float(output.loss.detach()) == 0
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_every_weight_that_trains_gets_a_gradient():
    model = tiny_model()
    ids, _, views = tiny_batch()
    model(
        ids, views, mlm_labels=ids.where(ids != 0, -1), action_labels=torch.tensor([1, 2, 3])
    ).loss.backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert idle == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert idle and all(name.startswith("cross_layers.1.view_") for name in idle)


@pytest.mark.parametrize(
    ("switch", "reached"),
    [
        ({"train_text": False}, {"cross_layers", "view_projection", "view_norm", "pooler", "action_head"}),
        ({"train_cross": False}, {"pooler", "action_head"}),
    ],
)
def test_switches_stop_gradients(switch, reached):
    model = tiny_model(**switch)
    ids, _, views = tiny_batch()
    model(ids, views, action_labels=torch.tensor([1, 2, 3])).loss.backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == reached
    same = tiny_model()(ids, views, action_labels=torch.tensor([1, 2, 3])).loss
    torch.testing.assert_close(same, model(ids, views, action_labels=torch.tensor([1, 2, 3])).loss)


@pytest.mark.parametrize(("text", "cross"), [(True, True), (False, True), (False, False)])
def test_an_agent_chooses_what_trains(text, cross):
    model = tiny_model(Prevalent)
    model.set_trained(text=text, cross=cross)
    ids, _, views = tiny_batch()
    out = model(ids, views)
    assert out.requires_grad == cross
    if cross:
        out.sum().backward()
    model.pooler.requires_grad_(False)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert any(p.requires_grad for p in model.text_layers.parameters()) == text
    with pytest.raises(ValueError, match="text=True needs cross=True"):
        model.set_trained(text=True, cross=False)


def test_words_under_bfloat16_autocast_stay_near():
    model = tiny_model()
    ids, _, views = tiny_batch()
    labels = {"mlm_labels": ids.where(ids != 0, -1), "action_labels": torch.tensor([1, 2, 3])}
    with torch.no_grad():
        exact = model(ids, views, **labels).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(ids, views, **labels).loss
    assert rough.dtype == torch.float32 and abs(float(rough - exact)) < 0.1 * float(exact)


def test_new_words_leave_the_old_ones_as_they_were(tmp_path):
    model, ids = tiny_model(), tiny_batch()[0]
    views = tiny_batch()[2]
    before = model(ids, views, mlm_labels=ids.where(ids != 0, -1))
    states = Prevalent.forward(model, ids, views)
    logits = model.mlm_logits(states)
    assert model.resize_token_embeddings(43).num_embeddings == 43
    assert torch.equal(Prevalent.forward(model, ids, views), states)
    torch.testing.assert_close(model.mlm_logits(states)[..., :40], logits)
    assert model.embeddings.words.weight[40:].std() > 0.1 and not model.mlm_head.bias[40:].any()
    model.save_pretrained(tmp_path)
    assert PrevalentPretraining.from_pretrained(tmp_path).config.vocab_size == 43
    model.resize_token_embeddings(40)
    again = model(ids, views, mlm_labels=ids.where(ids != 0, -1))
    torch.testing.assert_close(again.loss, before.loss)


# ---- folders


def test_a_folder_round_trips_to_the_bit(tmp_path):
    model = tiny_model(action_target="view", orientation="interleaved", train_text=False)
    model.save_pretrained(tmp_path / "model")
    back = PrevalentPretraining.from_pretrained(tmp_path / "model")
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert back.config.num_actions == 37 and back.config.orientation == "interleaved"
    assert back.config.train_text is False and not back.training
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    trunk = Prevalent.from_pretrained(tmp_path / "model")  # without its heads
    ids, _, views = tiny_batch()
    assert torch.equal(trunk(ids, views), Prevalent.forward(model, ids, views))


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        PrevalentPretraining.from_pretrained(tmp_path)
    tiny_model(Prevalent).save_pretrained(tmp_path / "trunk")
    with pytest.raises(ValueError, match=r"missing: action_head\.bias, action_head\.weight, mlm_head"):
        PrevalentPretraining.from_pretrained(tmp_path / "trunk")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_target": "rank"}, "action_target is 'rank' but must be one of candidate_rank, view"),
        ({"orientation": "mixed"}, "orientation is 'mixed'"),
        ({"num_attention_heads": 3}, "hidden_size 16 is not a multiple of num_attention_heads 3"),
        ({"num_cross_layers": 0}, "num_cross_layers is 0 but must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_inputs_that_do_not_fit_are_refused():
    model = tiny_model()
    ids, _, views = tiny_batch()
    with pytest.raises(ValueError, match=r"views have 9 numbers but the model was made for 10 \(6 features"):
        model(ids, views[..., :9])
    with pytest.raises(ValueError, match="texts have 33 tokens but the model takes at most 32"):
        model(torch.ones(1, 33, dtype=torch.int64), views[:1])
    with pytest.raises(ValueError, match=re.escape("a label of the actions is 0 or 36")):
        model(ids, views, action_labels=torch.tensor([0, 36, 1]))


def test_released_names_are_those_of_the_specification():
    names = set(to_released(tiny_model()))
    assert len(names) == 19 + 16 * 2 + 42 * 2
    assert {
        "bert.lalayer.1.attention.self.query.weight", "bert.addlayer.0.visual_attention.att.value.bias",
        "bert.addlayer.1.visn_output.LayerNorm.weight", "bert.vision_encoder.visn_layer_norm.bias",
        "mlmhead.predictions.bias", "mlmhead.predictions.decoder.weight", "next_action.linear.bias",
    } <= names  # fmt: skip
