"""How well a speaker speaks: loss, accuracy of its next words, BLEU of what it says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object

from vln.bleu import corpus_bleu
from vln.recurrent import length_mask
from vln.speaker_data import SpeakerData
from vln.speaker_folder import TrainedSpeaker


class Said(NamedTuple):
    """What was said of a path."""

    item: int
    """Its number in the split."""
    words: list[str]
    text: str


class Evaluation(NamedTuple):
    """Scores of a split."""

    figures: dict[str, float]
    """loss (per word), word_accuracy, bleu_original and perhaps bleu (both 0 to 100), words (a text's)."""
    said: list[Said]


def require_sacrebleu() -> Any:
    """The library.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError(
            f"BLEU needs sacrebleu ({error}): pip install 'fq-gan[vln]', or give --no-sacrebleu to report "
            "the original's variant alone"
        ) from error
    return sacrebleu


@torch.no_grad()
def evaluate(
    trained: TrainedSpeaker, data: SpeakerData, accelerator: Accelerator, *,
    batch_size: int = 64, num_paths: int = 0, max_words: int = 120, sacrebleu: bool = True,
) -> Evaluation:  # fmt: skip
    """Scores on paths of a split, spread evenly over it; call on every process.

    Batches do not depend on how many processes there are, so neither does what is said.

    Args:
        trained: on the accelerator's device; it returns to the mode it is in.
        data: of the split.
        accelerator: of this process.
        batch_size: paths said together.
        num_paths: how many, 0 for all.
        max_words: longest text to say.
        sacrebleu: whether to report sacrebleu's BLEU too.

    Raises:
        ImportError: it is asked for and not installed.
    """
    size = len(data.items)
    picked = np.linspace(0, size, num=min(num_paths, size) if num_paths else size, endpoint=False)
    rows = picked.astype(np.int64)
    batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    totals = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    said: list[Said] = []
    training = trained.speaker.training
    trained.speaker.eval()
    try:
        for batch in batches[accelerator.process_index :: accelerator.num_processes]:
            sums, spoken = _evaluate_batch(trained, data, batch, accelerator.device, max_words)
            totals += sums
            said += spoken
    finally:
        trained.speaker.train(training)
    loss, correct, count = accelerator.reduce(totals, "sum").tolist()
    said = sorted(gather_object(said))
    figures = {"loss": loss / max(count, 1), "word_accuracy": correct / max(count, 1)}
    return Evaluation(figures | bleu_scores(trained, data, said, sacrebleu=sacrebleu), said)


def _evaluate_batch(
    trained: TrainedSpeaker, data: SpeakerData, rows: np.ndarray, device: Any, max_words: int
) -> tuple[torch.Tensor, list[Said]]:
    """Sums of loss, right words and words over the instructions of some paths, and what is said of these."""
    speaker, config = trained.speaker, trained.speaker.config
    batch = data.paths(rows, angle_size=config.angle_size, orientation=trained.orientation)
    lengths = batch.lengths.to(device)
    path = speaker.encoder(batch.actions.to(device), batch.panoramas.to(device), lengths)
    texts = np.flatnonzero(np.isin(data.item_of, rows))
    words = data.words(texts).to(device)
    owner = torch.from_numpy(np.searchsorted(rows, data.item_of[texts])).to(device)
    targets = words[:, 1:]
    mask = length_mask(lengths, path.shape[1])[owner]
    logits = speaker.decoder(words[:, :-1], path[owner], mask).logits.float()
    loss = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=config.pad_id, reduction="sum")
    counted = targets != config.pad_id
    correct = ((logits.argmax(-1) == targets) & counted).sum()
    spoken = speaker.say(path, lengths, max_words=max_words).tolist()
    said = [
        Said(int(row), trained.words.said(ids), trained.words.decode(ids))
        for row, ids in zip(rows, spoken, strict=True)
    ]
    return torch.stack([loss.double(), correct.double(), counted.sum().double()]), said


def bleu_scores(
    trained: TrainedSpeaker, data: SpeakerData, said: Sequence[Said], *, sacrebleu: bool
) -> dict[str, float]:
    """BLEU-4 over a corpus, 0 to 100, and the mean number of words said.

    Args:
        trained: whose words the original's variant compares.
        data: with the references.
        said: at least one text.
        sacrebleu: whether to report sacrebleu's BLEU, lower case, too.

    Raises:
        ImportError: it is asked for and not installed.
    """
    references = [data.items[spoken.item].instructions for spoken in said]
    original = corpus_bleu(
        [spoken.words for spoken in said],
        [[trained.words.split(text) for text in texts] for texts in references],
    )
    figures = {"bleu_original": 100 * original.score}
    if sacrebleu:
        most = max(map(len, references))
        columns = [[texts[n] if n < len(texts) else None for texts in references] for n in range(most)]
        score = require_sacrebleu().corpus_bleu([spoken.text for spoken in said], columns, lowercase=True)
        figures["bleu"] = float(score.score)
    return figures | {"words": float(np.mean([len(spoken.words) for spoken in said]))}


def sample_lines(split: str, data: SpeakerData, said: Sequence[Said], count: int) -> Iterator[str]:
    """What is said of some paths, spread evenly, beside their instructions, as text."""
    for number in np.linspace(0, len(said), num=min(count, len(said)), endpoint=False).astype(int):
        item = data.items[said[number].item]
        yield f"{split}, path {item.path_id} in {item.scan_id}, {len(item.path)} viewpoints"
        yield f"  speaker:   {said[number].text}"
        yield from (f"  reference: {text.strip()}" for text in item.instructions)
