"""Small agents and speakers as folders, and the command that walks them."""

import pytest
import torch
from tiny_vln import WORDS, tiny_model

from vln import evaluate
from vln.agent_data import Reading
from vln.agent_folder import save_agent
from vln.follower import Follower, FollowerConfig
from vln.model import Prevalent
from vln.speaker_folder import TrainedSpeaker, save_speaker
from vln.speaker_model import Speaker, SpeakerConfig
from vln.speaker_words import Words

SIZES = FollowerConfig(encoder_hidden=6, decoder_hidden=10, action_embedding=4)


def write_agent(folder, kind=Follower, task="r2r", num_instructions=1):
    """An agent whose weights are large enough to walk about."""
    agent = kind(tiny_model(Prevalent, vocab_size=5 + len(WORDS), feature_scale=2.0), SIZES)
    with torch.no_grad():
        for parameter in agent.decoder.parameters():
            parameter.mul_(3)
    save_agent(folder, agent, task=task, reading=Reading(12, num_instructions))
    return folder


def write_speaker(folder, width=6, scale=1.0):
    torch.manual_seed(2)
    words = Words(("<PAD>", "<UNK>", "<EOS>", *WORDS, "<BOS>"))
    sizes = SpeakerConfig(
        vocab_size=len(words), view_size=width + 8, angle_size=8, hidden_size=8, word_size=6
    )
    speaker = Speaker(sizes)
    with torch.no_grad():
        for parameter in speaker.parameters():
            parameter.mul_(scale)  # a new one says the same of all
    save_speaker(TrainedSpeaker(speaker, words, "interleaved"), folder)
    return folder


def run_walk(capsys, data, agent, *options):
    evaluate.main([str(agent), "--data", str(data), "--split", "val_seen", "--features", "random:6",
                   "--tokenizer", "tokenizer", "--max-steps", "6", *map(str, options)])  # fmt: skip
    return capsys.readouterr().out.splitlines()


def run_score(capsys, data, submission):
    evaluate.main([str(submission), "--data", str(data), "--split", "val_seen"])
    return capsys.readouterr().out.splitlines()


def refused(capsys, data, agent, *options):
    with pytest.raises(SystemExit) as stop:
        run_walk(capsys, data, agent, *options)
    return str(stop.value)
