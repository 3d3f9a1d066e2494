"""Class heads of the BigGAN discriminator: TAC-GAN's and what lies between."""

import pytest
import torch

from backbones.biggan import BigGANConfig, Discriminator, Verdict
from backbones.convert import infer_config

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 1, 2])


def build(head: str) -> Discriminator:
    torch.manual_seed(0)
    config = BigGANConfig(d_channels=2, num_classes=3, class_head=head)
    return Discriminator(config).eval()


@pytest.mark.parametrize(
    ("head", "keys"),
    [
        ("projection", {"embed"}),
        ("auxiliary", {"linear_c"}),
        ("auxiliary_projection", {"linear_c"}),
        ("twin", {"linear_c", "linear_mi"}),
    ],
)
def test_every_head_has_the_public_keys(head, keys):
    model = build(head)
    state = model.state_dict()
    assert {key.split(".")[0] for key in state} == {"blocks", "linear"} | keys
    for key in keys - {"embed"}:
        assert state[f"{key}.weight"].shape == (3, 8) and f"{key}.u0" in state
    inferred = infer_config(d_state=state)
    Discriminator(inferred).load_state_dict(state, strict=True)
    assert inferred.num_classes == 3


@torch.no_grad()
def test_a_verdict_unpacks_and_its_parts_are_linear_in_the_same_features():
    model = build("twin")
    realness, twin, scores = verdict = model(IMAGES, LABELS)
    assert isinstance(verdict, Verdict)
    assert realness.shape == (4, 1) and twin.shape == scores.shape == (4, 3)
    assert not torch.allclose(twin, scores)
    # The class of a picture does not change what a twin discriminator says.
    again = model(IMAGES, LABELS.flip(0))
    assert all(torch.equal(one, other) for one, other in zip(verdict, again, strict=True))


@torch.no_grad()
def test_the_projecting_head_adds_the_score_of_the_class():
    plain, projecting = build("auxiliary"), build("auxiliary_projection")
    projecting.load_state_dict(plain.state_dict())
    alone, added = plain(IMAGES, LABELS), projecting(IMAGES, LABELS)
    torch.testing.assert_close(added.realness, alone.realness + alone.class_scores.gather(1, LABELS[:, None]))
    assert alone.twin_scores is None and torch.equal(added.class_scores, alone.class_scores)


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match="class_head is 'tac' but must be one of projection, auxiliary"):
        BigGANConfig(class_head="tac")
