"""The NDH agent's decoder, against its formulas written out for one row."""

import torch
from torch.nn import functional as F

from vln.follower import Context, FollowerConfig
from vln.ndh_decoder import NDHDecoder


def tiny():
    torch.manual_seed(0)
    config = FollowerConfig(encoder_hidden=3, decoder_hidden=5)
    decoder = NDHDecoder(config, view_size=7, words_size=6, projection_size=4).eval()
    words = torch.randn(2, 1, 8, 6)
    mask = torch.arange(8) < torch.tensor([[[8]], [[5]]])
    context = Context(words, mask, torch.randn(2, 5), torch.randn(2, 5))
    return decoder, context, torch.randn(2, 36, 7), torch.randn(2, 4, 7)


def test_a_step_is_that_of_the_paper():
    decoder, context, panorama, candidates = tiny()
    action = torch.randn(2, 7)
    with torch.no_grad():
        step = decoder(action, panorama, candidates, context.hidden, context.cell, context)
        tilde, attention = context.hidden[1], decoder.view_attention
        shares = F.softmax(attention.key(panorama[1]) @ attention.query(tilde), dim=0)
        given = torch.cat([action[1], shares @ panorama[1]])
        hidden, cell = decoder.lstm(given[None], (tilde[None], context.cell[1:]))
        words, layer = context.words[1, 0, :5], decoder.word_attention
        attended = F.softmax(words @ layer.linear_in(hidden[0]), dim=0) @ words
        tilde = torch.tanh(layer.linear_out(torch.cat([attended, hidden[0]])))
        logits = [
            decoder.score(decoder.state_projection(tilde) * decoder.candidate_projection(candidate))[0]
            for candidate in candidates[1]
        ]
    torch.testing.assert_close(step.hidden[1], hidden[0])
    torch.testing.assert_close(step.cell[1], cell[0])
    torch.testing.assert_close(step.tilde[1], tilde)
    torch.testing.assert_close(step.logits[1], torch.stack(logits))


def test_the_first_action_is_nothing_and_lists_are_as_long_as_told():
    decoder, context, panorama, candidates = tiny()
    action = decoder.first_action(2)
    assert action.shape == (2, 7) and not action.any()
    step = decoder(
        action, panorama, candidates, context.hidden, context.cell, context,
        num_candidates=torch.tensor([4, 2]),
    )  # fmt: skip
    assert step.logits.isfinite().sum(1).tolist() == [4, 2]
    step.logits[step.logits.isfinite()].sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
