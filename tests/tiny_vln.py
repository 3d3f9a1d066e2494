"""A small world, data folder and models for the tests of the navigation agent."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import parity
from vln.model import PrevalentConfig, PrevalentPretraining
from vln.navgraph import NavGraph

WORDS = "turn left right walk past the red blue sofa door stairs and stop near a table".split()


def tiny_config(**changes):
    sizes = {
        "vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24,
        "num_text_layers": 2, "num_cross_layers": 2, "feature_size": 6, "angle_size": 4,
        "max_position_embeddings": 32,
    }  # fmt: skip
    return PrevalentConfig(**(sizes | changes))


def tiny_model(kind=PrevalentPretraining, seed=0, **changes):
    """A model with weights large enough that every part shows in the output."""
    torch.manual_seed(seed)
    model = kind(tiny_config(initializer_range=0.3, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            assert parameter.isfinite().all(), name
    return model.eval()


def tiny_batch(rows=3, length=7, seed=1, views=10):
    """Ids with padding, and panoramas."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (rows, length), generator=draw)
    lengths = torch.tensor([length - (2 * row) % (length - 2) for row in range(rows)])
    ids[torch.arange(length) >= lengths[:, None]] = 0
    return ids, lengths, torch.randn(rows, 36, views, generator=draw)


def grid(scan_id="house", width=5, height=4):
    """Viewpoints on a grid, 3 m apart."""
    positions = np.array([[3.0 * x, 3.0 * y, 0.0] for y in range(height) for x in range(width)])
    gaps = np.abs(positions[:, None] - positions[None]).sum(-1)
    edges = np.argwhere(gaps == 3.0)
    names = tuple(f"{scan_id}-{number}" for number in range(len(positions)))
    return NavGraph(scan_id, names, positions, np.ones(len(names), dtype=bool), edges.astype(np.int32))


def write_folder(folder, *, scans=("a", "b"), per_scan=4, seed=0):
    """Connectivity, R2R items and a tokeniser, as the real data have them."""
    random = np.random.default_rng(seed)
    (folder / "connectivity").mkdir(parents=True)
    rows = {"train": [], "val_seen": []}
    for scan in scans:
        graph = grid(scan)
        document = []
        for number, name in enumerate(graph.viewpoint_ids):
            pose = np.eye(4)
            pose[:3, 3] = graph.positions[number]
            flags = [other in graph.neighbours[number] for other in range(len(graph.viewpoint_ids))]
            document.append(
                {"image_id": name, "pose": pose.ravel().tolist(), "included": True, "unobstructed": flags}
            )
        path = folder / "connectivity" / f"{scan}_connectivity.json"
        path.write_text(json.dumps(document), encoding="utf-8")
        for split, count in (("train", per_scan), ("val_seen", 2)):
            for _ in range(count):
                start, goal = random.choice(len(graph.viewpoint_ids), size=2, replace=False)
                names = graph.shortest_path(graph.viewpoint_ids[start], graph.viewpoint_ids[goal])
                texts = [" ".join(random.choice(WORDS, size=random.integers(3, 8))) for _ in range(2)]
                rows[split].append(
                    {"path_id": len(rows[split]), "scan": scan, "heading": 0.5, "path": names,
                     "distance": 3.0 * (len(names) - 1), "instructions": texts}
                )  # fmt: skip
    for split, items in rows.items():
        (folder / f"R2R_{split}.json").write_text(json.dumps(items), encoding="utf-8")
    write_tokenizer(folder / "tokenizer")
    return folder


def write_tokenizer(folder):
    from transformers import BertTokenizerFast

    folder.mkdir()
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)


SHARED_VLN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "vln"


def parity_line(capsys, name):
    """What the parity command says about a stored file; the test is skipped without it."""
    path = SHARED_VLN / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    parity.main([str(path)])
    return capsys.readouterr().out.splitlines()[0]
