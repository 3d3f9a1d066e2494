"""Convert others' files: ``python -m vln.convert features|r4r|check|pretrained|agent|speaker ...``.

``features`` writes a store (``vln.features``) from a TSV or HDF5 file, ``r4r`` builds R4R from R2R, ``check``
holds a file of items against the graphs. ``pretrained``, ``agent`` and ``speaker`` turn released checkpoints
into folders that the other commands take, and with ``--released`` back; those that need pickled code are
refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vln.checks import instruction_counts, validate
from vln.data import read_cvdn, read_hanna, read_hanna_routes, read_ndh, read_r2r, read_r4r, read_rxr
from vln.features import read_hdf5, read_tsv
from vln.joined import JOIN_DISTANCE_M, join_paths, write_r2r
from vln.navgraph import load_graphs
from vln.store import FeatureStore

_READERS: dict[str, Callable[..., Any]] = {
    "r2r": read_r2r, "r4r": read_r4r, "rxr": read_rxr, "cvdn": read_cvdn, "ndh": read_ndh,
    "hanna": read_hanna, "hanna_routes": read_hanna_routes,
}  # fmt: skip
_SHOWN = 10
"""Findings that are printed."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Write a feature store from a TSV or HDF5 file; an interrupted run goes on where it was."""

    source: Annotated[str, tyro.conf.Positional]
    """.tsv, .tsv.gz, .zip, .hdf5 or .h5 file."""
    out: Annotated[str, tyro.conf.Positional]
    """Store to write, a folder."""
    dtype: Literal["float16", "float32"] = "float16"
    """Precision of the store."""
    width: int = 0
    """Take the first so many numbers of each view, such as 768 of a ViT's 1768; 0 takes all."""

    def run(self) -> str:
        """Convert; returns what to print."""
        if self.width < 0:
            raise ValueError(
                f"width is {self.width}: give 0 for all, or how many numbers of each view to take"
            )
        read = read_hdf5 if Path(self.source).suffix in (".hdf5", ".h5") else read_tsv
        items = read(self.source, width=self.width or None)
        store = FeatureStore.write(self.out, items, dtype=self.dtype, width=self.width or None)
        return f"{self.out}: {len(store)} viewpoints of width {store.width} in {self.dtype}"


@dataclass(frozen=True, kw_only=True)
class R4RConfig:
    """Build R4R from R2R: every two paths of which one begins near the other's end."""

    split: str
    """train, val_seen or val_unseen."""
    out: Annotated[str, tyro.conf.Positional]
    """JSON file to write, such as r4r/R4R_train.json."""
    data: str = "data/vln"
    """Folder with R2R items and graphs."""
    join_distance_m: float = JOIN_DISTANCE_M
    """Longest way from the end of the one to the start of the other."""

    def run(self) -> str:
        """Build; returns what to print."""
        items = read_r2r(self.data, self.split)
        graphs = load_graphs(self.data, sorted({item.scan_id for item in items}))
        joined = list(join_paths(items, graphs, join_distance_m=self.join_distance_m))
        write_r2r(self.out, joined)
        count = sum(len(item.instructions) for item in joined)
        return f"{self.out}: {len(joined)} paths, {count} instructions"


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Hold items against the graphs: faults are listed and the command fails, warnings are listed."""

    task: Annotated[
        Literal["r2r", "r4r", "rxr", "cvdn", "ndh", "hanna", "hanna_routes"], tyro.conf.Positional
    ]
    """Whose form the items have."""
    items: Annotated[str, tyro.conf.Positional]
    """Their file."""
    graphs: str = "data/vln"
    """Folder or archive of the connectivity files, or a data folder."""

    def run(self) -> str:
        """Check; returns what to print.

        Raises:
            ValueError: there are faults; the text lists them.
        """
        items = _READERS[self.task](self.items)
        findings = validate(items, load_graphs(self.graphs), origin=self.items)
        listed = [str(finding) for finding in findings[:_SHOWN]]
        if len(findings) > _SHOWN:
            listed.append(f"and {len(findings) - _SHOWN} more")
        faults = sum(finding.serious for finding in findings)
        text = f"{self.items}: {len(items)} items, {faults} faults, {len(findings) - faults} warnings"
        if self.task in ("r2r", "r4r", "hanna"):
            counts = instruction_counts(items)
            text += "".join(f"; {number} with {size} instructions" for size, number in counts.items())
        text = "\n  ".join([text, *listed])
        if faults:
            raise ValueError(text)
        return text


# Checkpoints. What converts them is imported late: the commands above need no model.


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """A released pre-training folder (config.json, pytorch_model.bin) to one of ours, or back."""

    source: Annotated[str, tyro.conf.Positional]
    """The released folder; with --released a run of vln.pretrain, or its folder model."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder to write, for --pretrained of vln.train and --init of vln.pretrain."""
    angle_size: int = 128
    """Of a released view's numbers, those of orientation; no tensor shows them."""
    released: bool = False
    """Write ours under the released names, as HAMT and VLN-BERT read them too."""

    def run(self) -> str:
        """Convert; returns what to print."""
        from vln.convert_checkpoints import export_pretrained, import_pretrained

        if self.released:
            return export_pretrained(Path(self.source), Path(self.out))
        return import_pretrained(Path(self.source), Path(self.out), angle_size=self.angle_size)


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """A released snapshot of an R2R agent to a folder of ours, or back.

    Raises:
        ValueError: a number is outside its range.
    """

    source: Annotated[str, tyro.conf.Positional]
    """The released file; with --released a run of vln.train, or the folder of an R2R agent."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder to write, for vln.evaluate and --agent of vln.train; with --released the file."""
    num_attention_heads: int = 12
    """Of a released encoder; no tensor shows them."""
    num_instructions: int = 1
    """1, or 3 for a released agent that reads all instructions of a path together."""
    max_tokens: int = 80
    """Longest text that a released agent reads."""
    released: bool = False
    """Write ours under the released names."""

    def __post_init__(self) -> None:
        if self.num_attention_heads < 1 or self.max_tokens < 3:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads} and max_tokens {self.max_tokens}: give "
                "at least 1 and at least 3"
            )

    def run(self) -> str:
        """Convert; returns what to print."""
        from vln.convert_checkpoints import export_agent, import_agent

        if self.released:
            return export_agent(Path(self.source), Path(self.out))
        return import_agent(
            Path(self.source), Path(self.out), num_attention_heads=self.num_attention_heads,
            num_instructions=self.num_instructions, max_tokens=self.max_tokens,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SpeakerConfig:
    """A released snapshot of EnvDrop's speaker to a folder of ours, or back."""

    source: Annotated[str, tyro.conf.Positional]
    """The released file; with --released a run of vln.speaker, or its folder model."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder to write, for vln.augment, --init of vln.speaker and --speaker of vln.evaluate; with --released
    the file."""
    words: str
    """The list of its words, one a line, that came with the released file; with --released, to write."""
    angle_size: int = 128
    """Of a released view's numbers, those of orientation; no tensor shows them."""
    released: bool = False
    """Write ours under the released names."""

    def run(self) -> str:
        """Convert; returns what to print."""
        from vln.convert_checkpoints import export_speaker, import_speaker

        source, out, words = Path(self.source), Path(self.out), Path(self.words)
        if self.released:
            return export_speaker(source, out, words=words)
        return import_speaker(source, out, words=words, angle_size=self.angle_size)


Command = (
    Annotated[FeaturesConfig, tyro.conf.subcommand("features")]
    | Annotated[R4RConfig, tyro.conf.subcommand("r4r")]
    | Annotated[CheckConfig, tyro.conf.subcommand("check")]
    | Annotated[PretrainedConfig, tyro.conf.subcommand("pretrained")]
    | Annotated[AgentConfig, tyro.conf.subcommand("agent")]
    | Annotated[SpeakerConfig, tyro.conf.subcommand("speaker")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run one of the conversions and print what came of it.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given; the text says what.
    """
    try:
        config: Any = tyro.cli(
            Command,  # type: ignore[arg-type]
            args=sys.argv[1:] if arguments is None else arguments,
            prog="python -m vln.convert",
            config=(tyro.conf.OmitArgPrefixes,),
        )
        print(config.run())
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
