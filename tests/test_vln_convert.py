"""Checkpoints as files both ways: to the bit, whole or not at all, and taken by the other commands."""

import json
import pickle

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_vln import WORDS, tiny_batch, tiny_model, write_folder

from fq.run import read_metrics
from vln import convert, evaluate, train
from vln.agent_data import Reading
from vln.agent_folder import load_agent, save_agent
from vln.checkpoints import from_released, save_released, to_released
from vln.convert_checkpoints import UNUSED
from vln.follower import Follower, FollowerConfig
from vln.hanna_model import HannaAgent, HannaAgentConfig
from vln.model import Prevalent, PrevalentPretraining
from vln.snapshots import (
    FollowerSnapshot,
    SpeakerSnapshot,
    follower_to_released,
    read_snapshot,
    speaker_to_released,
    write_snapshot,
)
from vln.speaker_folder import TrainedSpeaker, fingerprint, load_speaker, save_speaker
from vln.speaker_model import Speaker, SpeakerConfig
from vln.speaker_words import Words

VOCABULARY = 5 + len(WORDS)
SIZES = FollowerConfig(encoder_hidden=5, decoder_hidden=7, action_embedding=3)
SPOKEN = Words(("<PAD>", "<UNK>", "<EOS>", *WORDS, "<BOS>"))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "world")


def run(capsys, *arguments):
    convert.main(list(map(str, arguments)))
    return capsys.readouterr().out.strip()


def refused(*arguments):
    with pytest.raises(SystemExit) as stop:
        convert.main(list(map(str, arguments)))
    return str(stop.value)


def tiny_follower(**changes):
    return Follower(tiny_model(Prevalent, **({"vocab_size": VOCABULARY, "angle_size": 8} | changes)), SIZES)


def agent_file(path, *, num_instructions=1, epoch=7):
    """A released snapshot with the weights that it holds and nothing uses."""
    torch.manual_seed(5)
    other = "encoder2decoder" if num_instructions == 1 else "encoder_lstm2decoder"
    unused = {
        "encoder": {f"{other}_{part}.bias": torch.randn(7) for part in ("ht", "ct")},
        "decoder": {"feat_att_layer.linear_out.weight": torch.randn(7, 21)},
    }
    parts = follower_to_released(FollowerSnapshot(tiny_follower(), num_instructions, unused))
    write_snapshot(parts, path, epoch=epoch)
    return parts


def tiny_speaker(**changes):
    torch.manual_seed(1)
    sizes = {"vocab_size": len(SPOKEN), "view_size": 14, "angle_size": 8, "hidden_size": 8, "word_size": 6}
    return Speaker(SpeakerConfig(**(sizes | changes))).eval()


def speaker_file(folder):
    """A released snapshot of a speaker and the list of its words."""
    unused = {"decoder": {"baseline_projection.0.weight": torch.randn(3, 8)}}
    parts = speaker_to_released(SpeakerSnapshot(tiny_speaker(packed=False), unused))
    write_snapshot(parts, folder / "speaker")
    (folder / "vocab.txt").write_text("\n".join(SPOKEN.entries[:-1]) + "\n")
    return parts


def require_equal(found, expected):
    assert found.keys() == expected.keys()
    for part, state in expected.items():
        assert found[part].keys() == state.keys()
        assert all(torch.equal(found[part][key], state[key]) for key in state)


# ---- pre-trained models


def test_a_pretrained_folder_goes_both_ways_to_the_bit(tmp_path, capsys):
    model = tiny_model()
    save_released(model, tmp_path / "released")
    told = run(capsys, "pretrained", tmp_path / "released", tmp_path / "ours", "--angle-size", 4)
    assert told.endswith("2+2 layers, 0.0 M parameters, 6 features and 4 orientation numbers a view")
    ours = PrevalentPretraining.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in ours.state_dict().items())
    assert not list((tmp_path / "ours").glob("*.bin"))
    assert "released names" in run(capsys, "pretrained", tmp_path / "ours", tmp_path / "back", "--released")
    for name in ("released", "back"):
        stored = torch.load(tmp_path / name / "pytorch_model.bin", weights_only=True)
        require_equal({"": stored}, {"": to_released(model)})
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("released", "back")]
    assert configs[0] == configs[1]
    assert {path.name for path in tmp_path.iterdir()} == {"released", "ours", "back"}


def test_a_run_of_another_form_is_exported_as_one_that_computes_the_same(tmp_path, capsys):
    """Released code gives features without our scale, and orientation in blocks."""
    model = tiny_model(angle_size=8, orientation="interleaved", feature_scale=10.0)
    (tmp_path / "run").mkdir()
    model.save_pretrained(tmp_path / "run" / "model")
    run(capsys, "pretrained", tmp_path / "run", tmp_path / "released", "--released")
    plain = from_released(tmp_path / "released", angle_size=8)
    assert (plain.config.feature_scale, plain.config.orientation) == (1.0, "blocks")
    ids, lengths, _ = tiny_batch()
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    features, four = torch.randn(3, 36, 6), torch.randn(3, 36, 4)
    blocks = torch.cat([features, four.repeat_interleave(2, dim=-1)], dim=-1)
    interleaved = torch.cat([10 * features, four, four], dim=-1)
    with torch.no_grad():
        ours, theirs = (
            kind.fuse(kind.encode_text(ids, mask), kind.embed_views(views), mask)
            for kind, views in ((model, interleaved), (plain, blocks))
        )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


# ---- agents


@pytest.mark.parametrize("num_instructions", [1, 3])
def test_an_agents_snapshot_goes_both_ways_to_the_bit(tmp_path, capsys, num_instructions):
    parts = agent_file(tmp_path / "released", num_instructions=num_instructions)
    options = ("--num-attention-heads", 2, "--num-instructions", num_instructions, "--max-tokens", 20)
    told = run(capsys, "agent", tmp_path / "released", tmp_path / "ours", *options)
    assert f"reads {num_instructions} instruction(s), {VOCABULARY} words, 6 features and 8" in told
    loaded = load_agent(tmp_path / "ours")
    assert loaded.task == "r2r" and loaded.reading == Reading(20, num_instructions)
    settings = json.loads((tmp_path / "ours" / "agent.json").read_text())
    assert settings["trunk"]["orientation"] == "interleaved"
    assert settings["reading"]["num_instructions"] == num_instructions
    expected = tiny_follower().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.agent.state_dict().items())
    run(capsys, "agent", tmp_path / "ours", tmp_path / "back", "--released")
    require_equal(read_snapshot(tmp_path / "back"), parts)


def test_a_converted_agent_walks_and_is_trained_further(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    agent_file(tmp_path / "released")
    run(capsys, "agent", tmp_path / "released", tmp_path / "ours", "--num-attention-heads", 2)
    given = [str(tmp_path / "ours"), "--data", str(data), "--split", "val_seen", "--features", "random:6"]
    evaluate.main([*given, "--tokenizer", "tokenizer", "--max-steps", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("r2r val_seen") and lines[1].endswith(": 8 items, nothing to refuse")
    with pytest.raises(SystemExit, match=r"no tokeniser: looked for .*nowhere"):
        evaluate.main([*given, "--tokenizer", "nowhere"])
    options = "--features random:6 --steps 1 --batch-size 2 --max-steps 4 --eval-max-steps 4 --maps 0 --lr 0"
    options += " --tune none --val-splits val_seen --select val_seen/spl"
    train.train(train.parse(["houses", "--data", str(data), "--agent", str(tmp_path / "ours"), "--out",
                             str(tmp_path / "run"), *options.split()]))  # fmt: skip
    assert read_metrics(tmp_path / "run")[0]["loss"] > 0
    first, second = (load_agent(tmp_path / name).agent.state_dict() for name in ("ours", "run"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    AcceleratorState._reset_state(reset_partial_state=True)


def test_agents_that_the_released_code_cannot_run_are_not_exported(tmp_path):
    for number, (changes, message) in enumerate([
        ({"orientation": "blocks"}, "reads orientation in blocks, the released code interleaved"),
        ({"orientation": "interleaved", "feature_scale": 10.0}, "reads features times 10, which the"),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        save_agent(folder, tiny_follower(**changes), task="r2r", reading=Reading())
        assert message in refused("agent", folder, tmp_path / "out", "--released")
    helper = HannaAgent(tiny_model(Prevalent), HannaAgentConfig(hidden_size=8))
    save_agent(tmp_path / "hanna", helper, task="hanna", reading=Reading())
    text = refused("agent", tmp_path / "hanna", tmp_path / "out", "--released")
    assert "holds an agent for hanna: the released layout is that of R2R" in text
    assert not (tmp_path / "out").exists()


# ---- speakers


def test_a_speakers_snapshot_goes_both_ways_to_the_bit(tmp_path, capsys):
    parts = speaker_file(tmp_path)
    words = tmp_path / "vocab.txt"
    told = run(capsys, "speaker", tmp_path / "speaker", tmp_path / "ours", "--words", words,
               "--angle-size", 8)  # fmt: skip
    assert told.endswith(f"speaker of {len(SPOKEN)} words, 6 features a view")
    direct, ours = (
        load_speaker(tmp_path / "speaker", words=words, angle_size=8),
        load_speaker(tmp_path / "ours"),
    )
    assert fingerprint(ours) == fingerprint(direct) and ours.orientation == "interleaved"
    run(
        capsys,
        "speaker",
        tmp_path / "ours",
        tmp_path / "back",
        "--words",
        tmp_path / "back.txt",
        "--released",
    )
    require_equal(read_snapshot(tmp_path / "back"), parts)
    assert (tmp_path / "back.txt").read_bytes() == words.read_bytes()
    text = refused("speaker", tmp_path / "ours", tmp_path / "more", "--words", words, "--released")
    assert "vocab.txt is there already" in text and not (tmp_path / "more").exists()


def test_speakers_that_the_released_code_cannot_run_are_not_exported(tmp_path):
    save_speaker(TrainedSpeaker(tiny_speaker(), SPOKEN, "blocks"), tmp_path / "blocks")
    given = (tmp_path / "out", "--words", tmp_path / "list", "--released")
    assert "reads orientation in blocks" in refused("speaker", tmp_path / "blocks", *given)
    speaker_file(tmp_path)
    assert "speaker is a file: give a run of vln.speaker" in refused("speaker", tmp_path / "speaker", *given)
    text = refused("speaker", tmp_path / "blocks", tmp_path / "out", "--words", tmp_path / "vocab.txt")
    assert "blocks is no file: give a released snapshot" in text
    assert not (tmp_path / "out").exists() and not (tmp_path / "list").exists()


def test_a_speaker_of_word_pieces_is_not_exported(data, tmp_path):
    from vln.speaker_words import load_tokenizer

    pieces = Words(SPOKEN.entries, load_tokenizer(data / "tokenizer"))
    save_speaker(TrainedSpeaker(tiny_speaker(), pieces, "interleaved"), tmp_path / "pieces")
    text = refused("speaker", tmp_path / "pieces", tmp_path / "out", "--words", tmp_path / "w", "--released")
    assert "speaks in pieces of a tokeniser, the released code in whole words" in text


# ---- what is refused


class Trap:
    def __reduce__(self):
        return (open, ("trapped", "w"))


def test_pickled_code_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_released(tiny_model(), tmp_path / "model")
    (tmp_path / "vocab.txt").write_text("\n".join(SPOKEN.entries[:-1]) + "\n")
    for path in (tmp_path / "model" / "pytorch_model.bin", tmp_path / "snapshot"):
        path.write_bytes(pickle.dumps({"encoder": {"state_dict": Trap()}}))
    for arguments in (
        ("pretrained", "model", "ours", "--angle-size", 4),
        ("agent", "snapshot", "ours"),
        ("speaker", "snapshot", "ours", "--words", "vocab.txt"),
    ):
        assert "holds pickled objects, which are not loaded because they could run code" in refused(
            *arguments
        )
    assert {path.name for path in tmp_path.iterdir()} == {"model", "snapshot", "vocab.txt"}


def test_a_taken_or_impossible_place_and_odd_sources_are_refused(tmp_path):
    agent_file(tmp_path / "released")
    (tmp_path / "taken").mkdir()
    for kind in ("pretrained", "agent"):
        for back in ((), ("--released",)):
            text = refused(kind, tmp_path / "released", tmp_path / "taken", *back)
            assert "taken is there already: delete it, or name another place" in text
    assert "below does not exist: make it first" in refused("agent", "x", tmp_path / "below" / "out")
    assert "nowhere does not exist" in refused("agent", "nowhere", tmp_path / "out")
    assert "nowhere holds no agent" in refused("agent", "nowhere", tmp_path / "out", "--released")
    assert "nowhere holds no config.json" in refused("pretrained", "nowhere", tmp_path / "out", "--released")
    with pytest.raises(ValueError, match="num_attention_heads is 0 and max_tokens 80: give at least 1"):
        convert.AgentConfig(source="x", out="y", num_attention_heads=0)
    text = refused("agent", tmp_path / "released", tmp_path / "out", "--num-instructions", 2)
    assert "num_instructions is 2: the released agents read 1 or 3" in text
    save_released(tiny_model(), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    text = refused("pretrained", tmp_path / "model", tmp_path / "out", "--angle-size", 4)
    assert "config.json lacks num_attention_heads" in text
    assert not (tmp_path / "out").exists()


def test_damaged_leftovers_of_a_released_file_are_refused(tmp_path, capsys):
    agent_file(tmp_path / "released")
    run(capsys, "agent", tmp_path / "released", tmp_path / "ours", "--num-attention-heads", 2)
    (tmp_path / "ours" / UNUSED).write_bytes(b"odd")
    text = refused("agent", tmp_path / "ours", tmp_path / "out", "--released")
    assert f"{UNUSED} is damaged: convert the released file again" in text
