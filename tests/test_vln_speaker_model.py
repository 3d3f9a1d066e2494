"""The speaker: its loss, what it says, and that rows do not depend on each other."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vln.draws import WORDS, uniforms
from vln.snapshots import SpeakerSnapshot, speaker_from_released, speaker_to_released
from vln.speaker_model import Speaker, SpeakerConfig

CONFIG = SpeakerConfig(vocab_size=11, view_size=9, angle_size=4, hidden_size=8, word_size=5)


def tiny_speaker(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    speaker = Speaker(config).eval()
    with torch.no_grad():
        for parameter in speaker.parameters():
            parameter.mul_(4)
    return speaker


def paths(rows=3, steps=5, seed=2):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([steps - row for row in range(rows)])
    actions = torch.randn(rows, steps, 9, generator=draw)
    actions[torch.arange(steps) >= lengths[:, None] - 1] = 0  # STOP's and the padding
    return actions, torch.randn(rows, steps, 36, 9, generator=draw), lengths


def one(given, row):
    length = int(given[2][row])
    return given[0][row : row + 1, :length], given[1][row : row + 1, :length], given[2][row : row + 1]


def test_loss_is_that_of_each_word_under_its_predecessors():
    speaker, given = tiny_speaker(), paths()
    words = torch.tensor([[10, 4, 5, 2, 0, 0], [10, 6, 7, 8, 9, 2], [10, 2, 0, 0, 0, 0]])
    with torch.no_grad():
        loss, count = speaker(*given, words)
        path = speaker.encoder(*given)
        for row in range(3):
            said = speaker.decoder(
                words[row : row + 1, : count[row]],
                path[row : row + 1, : given[2][row]],
                torch.ones(1, int(given[2][row]), dtype=torch.bool),
            )
            targets = words[row, 1 : count[row] + 1]
            torch.testing.assert_close(loss[row], F.cross_entropy(said.logits[0], targets, reduction="sum"))
    assert count.tolist() == [3, 5, 1]


def test_a_row_is_the_same_in_any_batch_but_for_released_speakers():
    given = paths()
    for packed in (True, False):
        speaker = tiny_speaker(dataclasses.replace(CONFIG, packed=packed))
        with torch.no_grad():
            together, alone = speaker.encoder(*given)[2, :3], speaker.encoder(*one(given, 2))[0]
        assert torch.allclose(together, alone, rtol=0, atol=1e-6) == packed


def test_greedy_words_are_the_likeliest_and_end_with_eos():
    speaker, given = tiny_speaker(), paths(8, 9)
    said = speaker.speak(*given, max_words=12)
    with torch.no_grad():
        start = torch.full((8, 1), CONFIG.bos_id)
        mask = torch.arange(9) < given[2][:, None]
        logits = speaker.decoder(
            torch.cat([start, said[:, :-1]], dim=1), speaker.encoder(*given), mask
        ).logits
    logits[..., [0, 1, 10]] = -torch.inf
    for row in range(8):
        ends = (said[row] == CONFIG.eos_id).nonzero()[:, 0].tolist()
        stop = ends[0] + 1 if ends else said.shape[1]
        assert torch.equal(said[row, :stop], logits[row, :stop].argmax(-1))
        assert (said[row, stop:] == 0).all()
    assert not torch.isin(said[said != 0], torch.tensor([1, 10])).any()
    assert len(set(map(tuple, said.tolist()))) > 1


def test_drawn_words_depend_on_the_item_alone_and_follow_the_shares():
    speaker, given = tiny_speaker(), paths()

    def draw(items):
        return lambda step, count: torch.from_numpy(uniforms(3, WORDS, step, items, 1)[:, 0])

    together = speaker.speak(*given, max_words=10, temperature=0.7, draw=draw([5, 6, 7]))
    alone = speaker.speak(*one(given, 1), max_words=10, temperature=0.7, draw=draw([6]))
    width = alone.shape[1]
    assert torch.equal(together[1, :width], alone[0]) and not together[1, width:].any()
    with torch.no_grad():
        path = speaker.encoder(*one(given, 0))
        logits = speaker.decoder(torch.tensor([[10]]), path, torch.ones(1, 5, dtype=torch.bool)).logits[0, 0]
    logits[[0, 1, 10]] = -torch.inf
    many = [part.repeat_interleave(4000, dim=0) for part in one(given, 0)]
    drawn = speaker.speak(*many, max_words=1, temperature=2.0, draw=draw(np.arange(4000)))[:, 0]
    shares = torch.bincount(drawn, minlength=11) / 4000
    torch.testing.assert_close(shares, (logits / 2).softmax(-1), rtol=0, atol=0.03)


def test_options_that_cannot_be_are_refused():
    speaker, given = tiny_speaker(), paths()
    with pytest.raises(ValueError, match=r"temperature -1\.0, max_words 120"):
        speaker.speak(*given, temperature=-1.0)
    with pytest.raises(ValueError, match="hidden_size is 7 but must be even"):
        dataclasses.replace(CONFIG, hidden_size=7)
    with pytest.raises(ValueError, match="the vocabulary has 11"):
        dataclasses.replace(CONFIG, unk_id=11)


def test_a_released_speaker_round_trips_to_the_bit():
    speaker = tiny_speaker(dataclasses.replace(CONFIG, packed=False))
    unused = {
        "baseline_projection.0.weight": torch.randn(128, 8),
        "baseline_projection.0.bias": torch.randn(128),
        "baseline_projection.3.weight": torch.randn(1, 128),
        "baseline_projection.3.bias": torch.randn(1),
    }
    parts = speaker_to_released(SpeakerSnapshot(speaker, {"decoder": unused}))
    assert "attention_layer.linear_out.weight" in parts["encoder"]
    snapshot = speaker_from_released(parts, angle_size=4)
    assert snapshot.speaker.config == speaker.config
    again = speaker_to_released(snapshot)
    for name, state in parts.items():
        assert again[name].keys() == state.keys()
        assert all(torch.equal(again[name][key], state[key]) for key in state)
    given = paths()
    assert torch.equal(snapshot.speaker.speak(*given), speaker.speak(*given))
    with pytest.raises(ValueError, match="the encoder of the speaker's snapshot does not fit"):
        speaker_from_released(parts | {"encoder": parts["encoder"] | {"odd": torch.zeros(1)}})
