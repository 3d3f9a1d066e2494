"""Write instructions for sampled paths: ``python -m vln.augment SPEAKER --data FOLDER --out FILE``.

Shortest paths between random viewpoints of the training scans are put into words by a trained speaker and
written in the form of R2R, for ``vln.pretrain --extra`` and back-translation. Work is done in shards of fixed
content; every draw is a function of seed, path, text and word. So the file is the same, byte for byte, for
any number of processes (``accelerate launch -m vln.augment ...``) and however often it was interrupted. On a
CPU each process computes on one thread: start as many as there are cores.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import tqdm

from fq.provenance import provenance
from fq.run import write_atomically
from vln.augment_paths import PathFilter, PathSource, SampledPath
from vln.data import read_r2r
from vln.draws import WORDS, uniforms
from vln.items import R2RItem
from vln.navgraph import load_graphs
from vln.pretrain_config import TripletsConfig
from vln.pretrain_data import open_features
from vln.speaker_folder import TrainedSpeaker, fingerprint, load_speaker
from vln.triplets import roll_triplets
from vln.walks import PanoramaFeatures, Walk, path_batch, roll_walks
from vln.world import World

PAPER = {"paths": 178_300, "instructions": 1_020_000, "triplets": 6_482_000}
"""What the published pre-training data are made of."""

_SPLITS = ("train", "val_seen", "val_unseen", "test")
_TEXT = 2**32
"""Between the draws of a path's texts, so that those of the first do not depend on how many there are."""


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
    """Store of view features, a folder there or below data, or random:WIDTH: those of the speaker's training."""
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


class Job(NamedTuple):
    """What is to be done, the same on every process."""

    paths: list[SampledPath]
    first_id: int
    """Of the paths: above all of the data."""
    world: World
    features: PanoramaFeatures
    trained: TrainedSpeaker
    identity: dict[str, Any]
    """What the output is a function of."""
    seconds: float
    """Spent on sampling the paths."""


class Shard(NamedTuple):
    """Some paths with their instructions, and what they took."""

    rows: list[dict[str, Any]]
    triplets: int
    speaking_s: float
    rolling_s: float


def augment(config: AugmentConfig) -> Path:
    """Write the file, or finish it.

    Args:
        config: see `AugmentConfig`.

    Returns:
        The file.

    Raises:
        FileNotFoundError: speaker, data or features are missing; the text names the file.
        FileExistsError: the file, or an unfinished one, is there and of other options.
        ValueError: things do not fit together, or there are not so many paths.
    """
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    out = Path(config.out)
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out.absolute().parent} does not exist: make it first")
    job = prepare(config)
    job.trained.speaker.to(accelerator.device)
    if _finished(out, job.identity):
        accelerator.print(f"{out} is there already, of the same options")
        return out
    folder, shards = _work_folder(out), -(-len(job.paths) // config.shard_size)
    _require_same(folder / "identity.json", job.identity, f"{folder} holds an unfinished file")
    accelerator.wait_for_everyone()  # all have looked before anything is written
    if accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
        write_atomically(folder / "identity.json", _json(job.identity))
    accelerator.wait_for_everyone()
    missing = [number for number in range(shards) if not _shard_file(folder, number).is_file()]
    accelerator.print(
        f"{len(job.paths)} paths of {len(job.world.graphs)} scans, {config.num_instructions} texts each at "
        f"temperature {config.temperature:g}: {len(missing)} of {shards} shards to do by "
        f"{accelerator.num_processes} process(es) on {accelerator.device}, into {out}"
    )
    accelerator.wait_for_everyone()  # all have the same list before the first shard appears
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    with _one_thread(accelerator.device):
        for number in tqdm(mine, desc="shards", main_process_only=True):
            shard = describe(config, job, number, accelerator.device)
            write_atomically(_shard_file(folder, number), _json(shard._asdict()))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        record = _merge(config, job, folder, shards, out, accelerator.num_processes)
        print(report(record["speed"]))
    accelerator.wait_for_everyone()
    return out


def prepare(config: AugmentConfig) -> Job:
    """Everything that the shards need, checked.

    Raises:
        FileNotFoundError: something is missing; the text names it.
        ValueError: things do not fit together, or there are not so many paths.
    """
    trained = load_speaker(config.speaker, words=config.words, angle_size=config.angle_size)
    items = {split: _items(config.data, split) for split in _SPLITS}
    scan_ids = sorted({item.scan_id for item in items["train"]})
    if not scan_ids:
        raise ValueError(f"{config.data} has no training items: there is no scan to sample")
    graphs = load_graphs(config.data, scan_ids)
    every = [item for listed in items.values() for item in listed]
    known = every if config.exclude_known else []
    source = PathSource(
        graphs, taken={(item.scan_id, item.path[0], item.path[-1]) for item in known}, chosen=config.paths
    )
    started = time.perf_counter()
    paths = source.sample(config.num_paths or len(source), seed=config.seed)
    seconds = time.perf_counter() - started
    first_id = 1 + max((item.path_id for item in every if isinstance(item.path_id, int)), default=0)
    world = World(graphs)
    features = open_features(TripletsConfig(data=config.data, features=config.features), world)
    trained.require_width(features.width, config.features)
    names = ("num_instructions", "temperature", "seed", "max_words", "batch_size", "shard_size")
    identity = {name: getattr(config, name) for name in names} | {
        "speaker": fingerprint(trained),
        "paths": hashlib.sha256(json.dumps([first_id, paths]).encode()).hexdigest(),
        "features": config.features,
    }
    return Job(paths, first_id, world, features, trained, identity, seconds)


def _items(data: str, split: str) -> list[R2RItem]:
    try:
        return read_r2r(data, split)
    except FileNotFoundError:
        if split == "train":
            raise
        return []  # a folder may have no such split


def describe(config: AugmentConfig, job: Job, number: int, device: Any) -> Shard:
    """Paths of one shard with their instructions.

    Args:
        config: numbers of texts and their draws.
        job: of `prepare`.
        number: of the shard.
        device: the speaker's.
    """
    first = number * config.shard_size
    paths = job.paths[first : first + config.shard_size]
    started = time.perf_counter()
    walks = [Walk(path.scan_id, path.path, path.heading, config.num_instructions) for path in paths]
    table = roll_walks(job.world, walks, shortest=False)
    texts: list[list[str]] = []
    for begin in range(0, len(paths), config.batch_size):
        rows = np.arange(begin, min(begin + config.batch_size, len(paths)))
        texts += _say(config, job, table, rows, first, device)
    spoken = time.perf_counter()
    triplets = len(roll_triplets(job.world, walks, shortest=False).text)
    rolled = time.perf_counter()
    return Shard(
        [_row(job.first_id + first + n, path, said) for n, (path, said) in enumerate(zip(paths, texts, strict=True))],
        triplets, spoken - started, rolled - spoken,
    )  # fmt: skip


@torch.no_grad()
def _say(
    config: AugmentConfig, job: Job, table: Any, rows: np.ndarray, first: int, device: Any
) -> list[list[str]]:
    """Texts of some walks of a shard's table; the walks are read once for all texts."""
    speaker, trained, count = job.trained.speaker, job.trained, config.num_instructions
    batch = path_batch(table, rows, job.world, job.features, angle_size=speaker.config.angle_size,
                       orientation=trained.orientation)  # fmt: skip
    lengths = batch.lengths.to(device)
    path = speaker.encoder(batch.actions.to(device), batch.panoramas.to(device), lengths)
    items = (first + rows[:, None] + _TEXT * np.arange(count)).reshape(-1)

    def draw(step: int, _: int) -> torch.Tensor:
        return torch.from_numpy(uniforms(config.seed, WORDS, step, items, 1)[:, 0])

    said = speaker.say(
        path.repeat_interleave(count, dim=0), lengths.repeat_interleave(count),
        max_words=config.max_words, temperature=config.temperature, draw=draw,
    )  # fmt: skip
    texts = [trained.words.decode(ids) for ids in said.tolist()]
    return [texts[begin : begin + count] for begin in range(0, len(texts), count)]


def _row(path_id: int, path: SampledPath, texts: Sequence[str]) -> dict[str, Any]:
    return {
        "path_id": path_id,
        "scan": path.scan_id,
        "heading": path.heading,
        "path": list(path.path),
        "distance": path.distance_m,
        "instructions": list(texts),
    }


# ---- files


def provenance_file(out: str | Path) -> Path:
    """Where the provenance of an output is written."""
    return Path(out).with_suffix(".provenance.json")


def _work_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.shards")


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:06d}.json"


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def _finished(out: Path, identity: dict[str, Any]) -> bool:
    """Whether the output is there, and of these options.

    Raises:
        FileExistsError: it is of others.
    """
    if not out.exists():
        return False
    file = provenance_file(out)
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("identity") == identity:
        return True
    raise FileExistsError(
        f"{out} is there already, and of other options, speaker or data: delete it or name another --out"
    )


def _require_same(file: Path, identity: dict[str, Any], what: str) -> None:
    if not file.is_file():
        return
    stored = json.loads(file.read_text(encoding="utf-8"))
    other = [name for name, value in identity.items() if stored.get(name) != value]
    if other:
        raise FileExistsError(
            f"{what} of other options ({', '.join(other)}): delete it, name another --out, or give the same again"
        )


def _merge(config: AugmentConfig, job: Job, folder: Path, shards: int, out: Path, world: int) -> dict[str, Any]:
    """Write output and provenance and remove the shards; returns the provenance."""
    partial, seconds, triplets = out.with_name(f".{out.name}.{os.getpid()}.partial"), [0.0, 0.0], 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            start = "[\n"
            for number in range(shards):  # one at a time: the whole may be larger than the memory
                shard = Shard(**json.loads(_shard_file(folder, number).read_text(encoding="utf-8")))
                for row in shard.rows:
                    file.write(start + json.dumps(row, ensure_ascii=False))
                    start = ",\n"
                triplets += shard.triplets
                seconds = [seconds[0] + shard.speaking_s, seconds[1] + shard.rolling_s]
            file.write("\n]\n")
            file.flush()
            os.fsync(file.fileno())
        counts = (len(job.paths), len(job.paths) * config.num_instructions, triplets)
        record = provenance(config.seed) | {
            "config": asdict(config),
            "identity": job.identity,
            "speaker": dict(job.trained.origin),
            "scan_ids": sorted(job.world.graphs),
            "num_paths": counts[0], "num_instructions": counts[1], "num_triplets": counts[2],
            "speed": speed(counts, (job.seconds, *seconds), processes=world),
        }  # fmt: skip
        # Before the file itself, which is what counts as finished.
        write_atomically(provenance_file(out), json.dumps(record, indent=2, allow_nan=False) + "\n")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    shutil.rmtree(folder)
    return record


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Sums of several threads may differ in the last bit from those of one, and so could a drawn word."""
    threads = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


# ---- speed


def speed(
    counts: tuple[int, int, int], seconds: tuple[float, float, float], *, processes: int
) -> dict[str, Any]:
    """Paths, instructions and triplets per second of one process, and what the paper's numbers would take.

    Args:
        counts: of paths, instructions and triplets.
        seconds: spent on drawing the first, saying the second, rolling the third, summed over processes.
        processes: that share the saying.

    Returns:
        ``<kind>_per_second`` of one process, ``processes``, and ``paper_hours`` of each kind with so many
        processes, and ``paper_hours_total``.
    """
    kinds = tuple(PAPER)
    rates = {kind: n / max(s, 1e-9) for kind, n, s in zip(kinds, counts, seconds, strict=True)}
    # Paths are sampled by every process for itself.
    shared = {"paths": 1, "instructions": processes, "triplets": processes}
    hours = {kind: PAPER[kind] / (rates[kind] * shared[kind]) / 3600 for kind in kinds}
    return {
        **{f"{kind}_per_second": round(rate, 3) for kind, rate in rates.items()},
        "processes": processes,
        "paper_hours": {kind: round(value, 5) for kind, value in hours.items()},
        "paper_hours_total": round(sum(hours.values()), 5),
    }


def report(figures: dict[str, Any]) -> str:
    """One text of the figures of `speed`."""
    return (
        f"{figures['paths_per_second']:,.0f} paths/s sampled, {figures['instructions_per_second']:,.1f} "
        f"instructions/s said, {figures['triplets_per_second']:,.0f} triplets/s rolled by one process; the "
        f"paper's {PAPER['paths']:,} paths, {PAPER['instructions']:,} instructions and {PAPER['triplets']:,} "
        f"triplets would take {figures['paper_hours_total']:.2f} h on {figures['processes']} process(es)"
    )


def main(arguments: list[str] | None = None) -> None:
    """Sample paths and describe them.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given, or it was interrupted; the text says what.
    """
    try:
        config = tyro.cli(
            AugmentConfig, args=sys.argv[1:] if arguments is None else arguments, prog="python -m vln.augment"
        )
        augment(config)
        gc.collect()  # the process group's threads must end before Python itself does
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on where this one was", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
