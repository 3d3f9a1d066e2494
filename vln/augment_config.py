"""Settings of the augmentation. The docstrings of the fields are the help text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from vln.augment_paths import PathFilter


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Sample paths in the training scans and let a speaker describe them. The same command goes on where an
    interrupted one was.

    Raises:
        ValueError: a number is outside its range.
    """

    speaker: Annotated[str, tyro.conf.Positional]
    """Run of vln.speaker, its model folder, or a released snapshot (with --words)."""
    out: str
    """R2R-format JSON file to write; its provenance goes beside it."""
    data: str = "data/vln"
    """Folder with connectivity and R2R items; the scans of its training items are sampled, no others."""
    features: str = "features"
    """Those that the speaker was trained with: a store, a folder there or below data, or random:WIDTH."""
    num_paths: int = 1000
    """Paths; 0 takes all that pass the filter: 178,300 on Matterport3D with --no-exclude-known."""
    num_instructions: int = 6
    """Texts of a path; the original sampled with 6 seeds."""
    temperature: float = 1.0
    """Of the draws; 1 as the speaker-follower's, lower keeps closer to the likeliest, 0 takes it."""
    seed: int = 0
    """Of paths, headings and words."""
    exclude_known: bool = True
    """Leave out paths between ends that some item of the data has; the published paths include them."""
    paths: tyro.conf.OmitArgPrefixes[PathFilter] = field(default_factory=PathFilter)
    max_words: int = 120
    """Longest text, EOS included."""
    batch_size: int = 32
    """Paths read together."""
    shard_size: int = 256
    """Paths written together, by one process; what an interruption can lose."""
    words: str = ""
    """Of a released snapshot: the list of its words, one a line."""
    angle_size: int = 128
    """Of a released snapshot: orientation numbers of a view."""

    def __post_init__(self) -> None:
        least = {"num_paths": 0, "num_instructions": 1, "temperature": 0, "seed": 0, "max_words": 1,
                 "batch_size": 1, "shard_size": 1}  # fmt: skip
        for name, bound in least.items():
            if not bound <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: give at least {bound}")
        if not self.temperature and self.num_instructions > 1:
            raise ValueError(
                f"temperature 0 says the same {self.num_instructions} times: give --num-instructions 1, or a "
                "temperature above 0"
            )
