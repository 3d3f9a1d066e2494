"""Checkpoints of others: names to the bit, sizes from the tensors, and what is refused."""

import json
import pickle

import pytest
import torch
from tiny_vln import tiny_batch, tiny_config, tiny_model

from vln.checkpoints import (
    from_released,
    initialise_from_bert,
    initialise_from_lxmert,
    load_released,
    read_tensors,
    save_released,
    to_released,
)
from vln.model import Prevalent, PrevalentPretraining


def test_a_released_folder_round_trips_to_the_bit(tmp_path):
    model = tiny_model()
    save_released(model, tmp_path)
    back = from_released(tmp_path, angle_size=4)
    assert back.config.to_dict() == model.config.to_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    stored = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    again = to_released(back)
    assert again.keys() == stored.keys() and all(torch.equal(again[key], stored[key]) for key in stored)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["la_layers"], config["vl_layers"], config["img_feature_dim"]) == (2, 2, 10)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}


def test_views_as_actions_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match="the released layout knows candidate ranks alone"):
        save_released(tiny_model(action_target="view"), tmp_path)


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


def test_the_set_of_names_must_be_exact():
    model = tiny_model()
    state = to_released(model)
    with pytest.raises(ValueError, match=r"does not fit the model \(missing: bert\.pooler\.dense\.bias\)"):
        load_released(model, without(state, "bert.pooler.dense.bias"))
    with pytest.raises(ValueError, match="unknown: surprise"):
        load_released(model, {**state, "surprise": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"next_action\.linear\.bias \[35\] instead of \[36\]"):
        load_released(model, {**state, "next_action.linear.bias": torch.zeros(35)})
    tied = "mlmhead.predictions.decoder.weight"
    with pytest.raises(ValueError, match="differ but the original ties them"):
        load_released(model, {**state, tied: state[tied] + 1})


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        from_released(tmp_path)
    save_released(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match="angle_size is 10 but the views have 10 numbers in all"):
        from_released(tmp_path, angle_size=10)
    weights = tmp_path / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged or holds pickled objects"):
        from_released(tmp_path, angle_size=4)
    torch.save([1, 2], weights)
    with pytest.raises(ValueError, match="holds a list but tensors by name were expected"):
        from_released(tmp_path, angle_size=4)
    torch.save({"other": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="a Prevalent model was expected"):
        from_released(tmp_path, angle_size=4)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin does not exist"):
        from_released(tmp_path, angle_size=4)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_tensors(tmp_path / "none.safetensors")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list but an object was expected"):
        from_released(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        from_released(tmp_path)


class Trap:
    def __reduce__(self):
        return (open, ("trapped", "w"))


def test_pickled_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_released(tiny_model(), tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="they could run code"):
        from_released(tmp_path)
    assert not (tmp_path / "trapped").exists()


def test_another_activation_is_refused(tmp_path):
    save_released(tiny_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act is 'relu' but the released models use 'gelu'"):
        from_released(tmp_path, angle_size=4)


def tiny_bert(layers, **changes):
    from transformers import BertConfig, BertModel

    torch.manual_seed(4)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24,
             "max_position_embeddings": 32, "initializer_range": 0.3}  # fmt: skip
    return BertModel(BertConfig(**(sizes | changes), num_hidden_layers=layers)).eval()


def test_text_layers_start_as_the_first_ones_of_bert(tmp_path):
    bert, model = tiny_bert(3), tiny_model(PrevalentPretraining)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bert.save_pretrained(tmp_path)
    names = initialise_from_bert(model, tmp_path)
    ids, _, _ = tiny_batch()
    with torch.no_grad():
        hidden = bert(ids, attention_mask=(ids != 0).long(), output_hidden_states=True).hidden_states
        torch.testing.assert_close(model.encode_text(ids), hidden[2], rtol=0, atol=2e-5)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= set(names)
    assert {name.split(".")[0] for name in names} == {"embeddings", "text_layers", "pooler"}
    with pytest.raises(ValueError, match="this BERT has 1 layers but the model 2"):
        initialise_from_bert(model, tiny_bert(1))
    with pytest.raises(ValueError, match=r"intermediate\.dense\.weight is \[20, 16\], not \[24, 16\]"):
        initialise_from_bert(model, tiny_bert(2, intermediate_size=20))


def test_lxmert_gives_all_but_the_projection_of_views(tmp_path):
    source = tiny_model(Prevalent, seed=5)
    theirs = {
        key.replace("lalayer.", "encoder.layer.").replace("addlayer.", "encoder.x_layers."): value
        for key, value in to_released(source).items()
    }
    torch.save(theirs, tmp_path / "lxmert.pth")
    model = tiny_model(Prevalent)
    names = initialise_from_lxmert(model, tmp_path / "lxmert.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]) == (not name.startswith("view_")), name
    assert len(names) == len(model.state_dict()) - 4
    with pytest.raises(ValueError, match=r"has no encoder\.x_layers: an LXMERT model was expected"):
        initialise_from_lxmert(model, {"bert.pooler.dense.bias": torch.zeros(16)})


def test_config_of_a_released_folder_says_what_its_answers_mean(tmp_path):
    save_released(PrevalentPretraining(tiny_config()), tmp_path)
    config = from_released(tmp_path, angle_size=4).config
    assert (config.action_target, config.orientation, config.num_actions) == ("candidate_rank", "blocks", 36)
