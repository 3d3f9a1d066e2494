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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import tqdm

from fq.provenance import provenance
from fq.run import write_atomically
from vln.augment_config import AugmentConfig
from vln.augment_paths import PathSource
from vln.augment_shards import Job, Shard, describe, report, speed, walks_of_paths
from vln.data import read_r2r
from vln.items import R2RItem
from vln.navgraph import load_graphs
from vln.pretrain_config import TripletsConfig
from vln.pretrain_data import open_features
from vln.speaker_folder import fingerprint, load_speaker
from vln.walks import roll_walks
from vln.world import World

_SPLITS = ("train", "val_seen", "val_unseen", "test")


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
        roll_walks(job.world, walks_of_paths(job.paths[:1], 1))  # builds tables, which no shard's time is for
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
            f"{what} of other options ({', '.join(other)}): delete it, name another --out, or "
            f"give the same again"
        )


def _merge(
    config: AugmentConfig, job: Job, folder: Path, shards: int, out: Path, world: int
) -> dict[str, Any]:
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
            "speed": speed(counts, (job.seconds, seconds[0], seconds[1]), processes=world),
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
