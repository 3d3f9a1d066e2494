"""Run folders: configuration, provenance, metrics and atomic checkpoints of one training run.

Training code alone imports this module (it needs ``accelerate``); ``fq/__init__`` never does. A run folder::

    config.json         resolved configuration, accepted again by --config
    provenance.json     list of records, one a start: command, seed, commit, versions, device, world size
    metrics.jsonl       one object a line
    samples/            pictures or texts
    checkpoints/        step_00000040/ ..., each with a manifest.json of sizes and sha256

The folder must lie on storage that all processes share: every process adds its random state to a checkpoint.
"""

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

try:
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list, gather_object
    from accelerate.utils import load as load_tensors
    from safetensors.torch import load_file
except ImportError as error:
    raise ImportError("fq.run needs accelerate and safetensors: pip install 'fq-gan[train]'") from error

from fq.provenance import provenance

CONFIG, PROVENANCE, METRICS, MANIFEST = "config.json", "provenance.json", "metrics.jsonl", "manifest.json"
STEP_NAME = re.compile(r"step_\d{8,}")
_T = TypeVar("_T")
_Changes = dict[str, tuple[Any, Any]]


class Steps(nn.Module):
    """Number of finished optimiser steps, as a tensor buffer that checkpoints carry.

    Give it to ``accelerator.prepare_model(steps, evaluation_mode=True)``. Not register_for_checkpointing,
    which reloads full pickles, and those can run code.

    Example:
        >>> steps = Steps()
        >>> steps.advance()
        >>> int(steps)
        1
    """

    step: Tensor

    def __init__(self) -> None:
        """Start at zero; ``step`` is int64 ``[]``."""
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def advance(self, count: int = 1) -> None:
        """Add ``count`` finished steps in place (no device synchronisation, unlike ``int(steps)``)."""
        self.step += count

    def __int__(self) -> int:
        """Read the counter; waits for the device."""
        return int(self.step.item())


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write a file so that readers see the old content or the new one, never a part.

    Args:
        path: the file; its folder must exist.
        data: text is written as UTF-8.

    Raises:
        OSError: the folder is missing or not writable; the old content stays.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_atomically(target, "kept")
        >>> target.read_text()
        'kept'
    """
    path = Path(path)
    # Same folder: a rename is only atomic within one file system. Not tempfile: its mode 0600 would
    # make a run unreadable to colleagues.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def load_config(path: str | Path) -> dict[str, Any]:
    """Read the stored configuration of a run.

    Args:
        path: a run folder or a ``config.json``.

    Returns:
        The nested configuration, as JSON holds it (tuples are lists).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a JSON object.
    """
    file = Path(path)
    file = file / CONFIG if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"no configuration at {file}: give a run folder, or the {CONFIG} inside one")
    config = _read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a JSON {type(config).__name__}, expected an object of option names")
    return config


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the logged values of a run, finished or still running.

    Args:
        path: a run folder or a ``metrics.jsonl``.

    Returns:
        One dict a logged line, in file order, each with ``"step"``; ``None`` stands for a value that was not
        finite. A last line that is still being written is left out; a run that logged nothing gives ``[]``.

    Raises:
        FileNotFoundError: there is neither a run folder nor such a file.
        ValueError: a line before the last is not a JSON object with a step.
    """
    file = Path(path)
    in_run = (file / CONFIG).is_file()
    file = file / METRICS if in_run else file
    if not file.is_file():
        if in_run:
            return []
        raise FileNotFoundError(f"no metrics at {file}: give a run folder, or the {METRICS} inside one")
    return [record for _, record in _metric_lines(file)]


def newest_checkpoint(path: str | Path) -> Path | None:
    """Newest checkpoint of a run whose files are all there and unchanged.

    A damaged newer one is reported by a ``UserWarning`` of one line; nothing is deleted.

    Args:
        path: a run folder. One without checkpoints gives ``None``.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    damages: list[str] = []
    for folder in reversed(_step_folders(Path(path) / "checkpoints")):
        damage = _damage(folder)
        if damage is None:
            for text in damages:
                warnings.warn(f"{text}: using an earlier one", UserWarning, stacklevel=2)
            return folder
        damages.append(f"checkpoint {folder} is damaged ({damage})")
    if damages:
        raise ValueError(f"no usable checkpoint: {'; '.join(damages)}. Restore one, or use another --out")
    return None


def checkpoint_tensors(checkpoint: str | Path, which: str = "model.safetensors") -> dict[str, Tensor]:
    """Tensors of one prepared module, without building the whole training around it.

    Args:
        checkpoint: a ``step_NNNNNNNN`` folder, see :func:`newest_checkpoint`.
        which: ``model.safetensors`` is the module prepared first, then ``model_1.safetensors``, ...

    Returns:
        Names to CPU tensors; the prefix that data-parallel wrapping adds to every name is removed.

    Raises:
        ValueError: the checkpoint is damaged, or has no such file of tensors.
    """
    folder = Path(checkpoint)
    if damage := _damage(folder):
        raise ValueError(f"checkpoint {folder} is damaged ({damage}): use another one")
    if which not in _manifest(folder)["files"] or not which.endswith(".safetensors"):
        offered = sorted(file.name for file in folder.glob("*.safetensors"))
        raise ValueError(f"checkpoint {folder} has no tensors {which!r}, expected one of {offered}")
    try:
        tensors = load_file(folder / which)
    except Exception as error:  # safetensors' own error derives from Exception alone
        raise _refusal(folder, error) from error
    wrapped = _manifest(folder)["world_size"] > 1 and all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in tensors.items()}


class RunFolder:
    """One training run on disk; build it with :meth:`open`.

    Only the main process writes (but for the random states within a checkpoint), and every decision is taken
    there and sent to the others, so that all processes go on, or all raise.

    Attributes ``path``, ``samples`` and ``checkpoints`` are the folder and those in it.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> run = RunFolder.open(folder, {"steps": 2}, Accelerator(cpu=True), seed=0)
        >>> run.log(1, {"loss": 0.5})
        >>> run.metrics()
        [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        """Refer to a folder that exists; :meth:`open` creates and checks it."""
        self.path = path
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self._accelerator = accelerator

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        accelerator: Accelerator,
        *,
        seed: int,
        may_change: Collection[str] = (),
    ) -> "RunFolder":
        """Create a run folder, or go on with the run that is there.

        ``config.json`` is written last and alone makes a folder a run, so one left half-made is made again.
        Going on appends a record to ``provenance.json``; options that did change are named in it and renewed
        in ``config.json``.

        Args:
            path: the folder.
            config: resolved configuration; nested dicts, lists, tuples, numbers, text, ``None``, paths.
            accelerator: of this process; call on every process.
            seed: of the run, for the provenance.
            may_change: dotted names of options that may differ (``"steps"``, ``"run.trackers"``); a name also
                covers what is nested in it.

        Raises:
            ValueError: the stored configuration differs; the folder holds other things; ``config`` holds what
                JSON cannot; or ``accelerator`` names checkpoints itself. Nothing is written then.
        """
        if accelerator.project_configuration.automatic_checkpoint_naming:
            # save_state would ignore our folder and delete old checkpoints before the new one is complete.
            raise ValueError("accelerator has automatic_checkpoint_naming=True, expected False: leave it out")
        run = cls(Path(path).expanduser().resolve(), accelerator)
        _on_main(accelerator, lambda: run._start(_plain(config), seed, may_change))
        return run

    def save(self, step: int, *, keep: int = 3) -> Path:
        """Write a checkpoint of everything prepared; call on every process.

        All files are on the disk, the manifest last, before a rename gives ``checkpoints/step_NNNNNNNN`` its
        name; the oldest checkpoints go only afterwards. Saving a step again replaces it.

        Args:
            step: finished steps.
            keep: newest checkpoints to keep, this one included.

        Raises:
            ValueError: ``step`` is negative, ``keep`` below 1, or objects are registered for checkpointing.
            OSError: the files cannot be written; earlier checkpoints stay.
        """
        if step < 0 or keep < 1:
            raise ValueError(f"step={step}, keep={keep}: expected step >= 0 and keep >= 1")
        self._refuse_registered_objects()
        folder = self.checkpoints / f"step_{step:08d}"
        partial = folder.with_name(f".{folder.name}.partial")
        _on_main(self._accelerator, lambda: _remove(partial))
        _on_all(self._accelerator, lambda: self._write_state(partial))
        _on_main(self._accelerator, lambda: self._publish(partial, folder, step, keep))
        return folder

    def resume(self) -> int | None:
        """Load the newest undamaged checkpoint into everything prepared; call on every process.

        A damaged newer one is reported by a warning of one line and left where it is. Leftovers of
        interrupted writes are removed, and ``metrics.jsonl`` loses the lines after the checkpoint's step (all
        lines when there is no checkpoint: the run starts over).

        Returns:
            The checkpoint's step, or ``None`` when there is none.

        Raises:
            ValueError: all checkpoints are damaged (nothing is deleted); a file holds pickled objects where
                tensors are expected; the checkpoint does not fit the prepared objects; it was written by
                another number of processes; or objects are registered for checkpointing.
        """
        self._refuse_registered_objects()
        found = _on_main(self._accelerator, self._find_checkpoint)
        if found is not None:
            _on_all(self._accelerator, lambda: self._load_state(found))
        step = None if found is None else _step_of(found)
        _on_main(self._accelerator, lambda: self._tidy(step))
        return step

    def log(self, step: int, values: Mapping[str, float | Tensor], *, prefix: str = "") -> None:
        """Append one line to ``metrics.jsonl`` and tell the trackers; writes on the main process only.

        JSON has no word for NaN and infinities: such a value is written as ``null``, and reaches the trackers
        as it is.

        Args:
            step: finished steps.
            values: names to numbers or tensors of one element.
            prefix: ``"train"`` turns ``"loss"`` into ``"train/loss"``.

        Raises:
            TypeError: a value is not a number.
            ValueError: a value is called ``"step"``.
        """
        if not self._accelerator.is_main_process:
            return
        start = f"{prefix}/" if prefix else ""
        named = {start + name: _number(name, value) for name, value in values.items()}
        if "step" in named:
            raise ValueError("a value is called 'step', which every line has already: give it another name")
        record = {"step": step} | {k: value if math.isfinite(value) else None for k, value in named.items()}
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        self._accelerator.log(named, step=step)

    def metrics(self) -> list[dict[str, Any]]:
        """Logged lines so far, see :func:`read_metrics`."""
        return read_metrics(self.path)

    def _start(self, config: dict[str, Any], seed: int, may_change: Collection[str]) -> None:
        changed, records = {}, []
        if is_run := (self.path / CONFIG).is_file():
            changed = self._permitted_changes(config, may_change)
            records = _read_json(self.path / PROVENANCE)
        else:
            _refuse_foreign(self.path)
        record = provenance(seed)
        if changed:
            record["changed"] = {name: {"from": old, "to": new} for name, (old, new) in changed.items()}
        self.samples.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        _write_json(self.path / PROVENANCE, [*records, record])
        if changed or not is_run:
            _write_json(self.path / CONFIG, config)  # last: it is what makes the folder a run

    def _permitted_changes(self, config: dict[str, Any], may_change: Collection[str]) -> _Changes:
        changed = _differences(load_config(self.path), config)
        refused = {name: pair for name, pair in changed.items() if not _covered(name, may_change)}
        if refused:
            listed = "; ".join(f"{k}: stored {old!r}, given {new!r}" for k, (old, new) in refused.items())
            raise ValueError(
                f"{self.path} holds a run with another configuration ({listed}): "
                f"use another --out, or the stored configuration (--config {self.path / CONFIG})"
            )
        return changed

    def _refuse_registered_objects(self) -> None:
        if self._accelerator._custom_objects:
            kinds = ", ".join(sorted({type(item).__name__ for item in self._accelerator._custom_objects}))
            raise ValueError(
                f"{kinds} registered by register_for_checkpointing, which reloads full pickles: "
                "keep what must resume in tensor buffers of a prepared module, as fq.run.Steps does"
            )

    def _write_state(self, partial: Path) -> None:
        try:
            self._accelerator.save_state(str(partial))
        except Exception as error:  # torch and safetensors raise their own kinds for a full disk
            raise OSError(f"cannot write checkpoint {partial}: {error}") from error

    def _publish(self, partial: Path, folder: Path, step: int, keep: int) -> None:
        _write_manifest(partial, step, self._accelerator.num_processes)
        # A folder cannot be renamed onto another one. A kill between the two renames is put right by resume.
        aside = folder.with_name(f".{folder.name}.replaced")
        if folder.exists():
            _remove(aside)
            folder.rename(aside)
        partial.rename(folder)
        _sync(self.checkpoints)
        _remove(aside)
        # Steps beyond this one are damaged ones that resume passed over: counting them as newest could
        # delete the checkpoint just written.
        reached = [old for old in _step_folders(self.checkpoints) if _step_of(old) <= step]
        for old in reached[:-keep]:
            _remove(old)

    def _find_checkpoint(self) -> Path | None:
        _put_back_replaced(self.checkpoints)
        folder = newest_checkpoint(self.path)
        if folder is None:
            return None
        written_by, here = _manifest(folder)["world_size"], self._accelerator.num_processes
        if written_by != here:
            # accelerate would go on, without the random states that the added processes lack.
            raise ValueError(
                f"{folder} was written by {written_by} process(es), resume with as many, not {here}"
            )
        return folder

    def _load_state(self, folder: Path) -> None:
        try:
            # accelerate ignores whatever goes wrong with random states, so they are tried before it starts.
            states = load_tensors(folder / f"random_states_{self._accelerator.process_index}.pkl")
            self._accelerator.load_state(str(folder))
        except Exception as error:  # pickle, safetensors, zip and key errors share no narrower base
            raise _refusal(folder, error) from error
        saved, here = len(states.get("torch_cuda_manual_seed", ())), torch.cuda.device_count()
        if saved != here:
            text = (
                f"{folder} has random states of {saved} GPU(s), here are {here}: random numbers will differ"
            )
            warnings.warn(text, UserWarning, stacklevel=2)

    def _tidy(self, step: int | None) -> None:
        for leftover in [*self.path.glob(".*.partial"), *self.checkpoints.glob(".step_*")]:
            _remove(leftover)
        file = self.path / METRICS
        if not file.exists():
            return
        kept = [line for line, record in _metric_lines(file) if step is not None and record["step"] <= step]
        write_atomically(file, b"".join(kept))


def _on_main(accelerator: Accelerator, decide: Callable[[], _T]) -> _T:
    """Result of ``decide`` on the main process, returned or raised on all of them."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer = [decide(), None]
        except Exception as error:
            # Raised here alone, the other processes would wait for it for ever.
            answer = [None, error]
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return cast(_T, answer[0])


def _on_all(accelerator: Accelerator, act: Callable[[], None]) -> None:
    """Do ``act`` on every process, wait for all, and raise on all what failed on any."""
    failure: Exception | None = None
    try:
        act()
    except Exception as error:
        failure = error
    failures = [error for error in gather_object([failure]) if error is not None]
    if failures:
        raise failure if failure is not None else failures[0]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` as JSON gives it back, so that it compares with a stored one."""
    try:
        text = json.dumps(dict(config), default=_jsonable, allow_nan=False)
        return cast(dict[str, Any], json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the configuration cannot be stored as JSON: {error}") from error


def _jsonable(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}, expected numbers, text, lists, dicts, paths")


def _differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> _Changes:
    """Dotted names of options that differ, with the stored and the given value."""
    old, new = _leaves(stored), _leaves(given)
    pairs = {name: (old.get(name, "(absent)"), new.get(name, "(absent)")) for name in old | new}
    # 1 == 1.0 is wanted (a command line parses either to a float), 1 == True is not.
    return {k: (a, b) for k, (a, b) in pairs.items() if a != b or isinstance(a, bool) != isinstance(b, bool)}


def _leaves(config: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        found |= _leaves(value, f"{start}{key}.") if nested else {start + key: value}
    return found


def _covered(name: str, allowed: Collection[str]) -> bool:
    return any(name == option or name.startswith(f"{option}.") for option in allowed)


def _refuse_foreign(path: Path) -> None:
    """Accept what is missing, empty, or a run whose creation was interrupted."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, expected a run folder or a new name: use another --out")
    items = path.iterdir() if path.is_dir() else iter(())
    foreign = sorted(item.name for item in items if not _from_creation(item))
    if foreign:
        raise ValueError(f"{path} has no {CONFIG} but other things ({foreign[0]}): use another --out")


def _from_creation(item: Path) -> bool:
    if item.name in {"samples", "checkpoints"}:
        return item.is_dir() and not any(item.iterdir())
    return item.name == PROVENANCE or (item.name.startswith(".") and item.name.endswith(".partial"))


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _step_folders(checkpoints: Path) -> list[Path]:
    """Checkpoints by step, the oldest first."""
    found = checkpoints.iterdir() if checkpoints.is_dir() else iter(())
    return sorted((item for item in found if item.is_dir() and STEP_NAME.fullmatch(item.name)), key=_step_of)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _put_back_replaced(checkpoints: Path) -> None:
    for aside in checkpoints.glob(".step_*.replaced"):
        folder = aside.with_name(aside.name.removeprefix(".").removesuffix(".replaced"))
        if not folder.exists():
            aside.rename(folder)


def _write_manifest(folder: Path, step: int, world_size: int) -> None:
    files = {}
    for file in sorted(folder.iterdir()):
        _sync(file)
        files[file.name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    _write_json(folder / MANIFEST, {"step": step, "world_size": world_size, "files": files})


def _manifest(folder: Path) -> dict[str, Any]:
    return cast(dict[str, Any], _read_json(folder / MANIFEST))


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, ``None`` when every file is as it was written."""
    try:
        manifest = _manifest(folder)
        if manifest["step"] != _step_of(folder):
            return f"{MANIFEST} is of step {manifest['step']}"
        # A file that is not listed could be loaded in place of a listed one.
        unlisted = {item.name for item in folder.iterdir()} - {MANIFEST, *manifest["files"]}
        if unlisted:
            return f"{', '.join(sorted(unlisted))} not in {MANIFEST}"
        for name, expected in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes, expected {expected['size']}"
            if _sha256(folder / name) != expected["sha256"]:
                return f"{name} has another sha256 than when it was written"
        return None
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        return f"a file is missing or cannot be read: {error!r}"


def _refusal(folder: Path, error: Exception) -> ValueError:
    """Error for a checkpoint that could not be loaded, naming the file when it is one file's fault."""
    for file in sorted(folder.iterdir()):
        try:
            if file.suffix == ".safetensors":
                load_file(file)
            elif file.suffix in {".bin", ".pkl"}:
                load_tensors(file, map_location="cpu")
        except Exception as reason:
            text = str(reason).strip().partition("\n")[0]
            return ValueError(
                f"{file} does not hold plain tensors ({type(reason).__name__}: {text}) and was not loaded, "
                "because pickled objects can run code: use a checkpoint that this program wrote"
            )
    return ValueError(
        f"checkpoint {folder} does not fit what was prepared ({type(error).__name__}: {error}): "
        "prepare the same modules and optimisers, in the same order, as when it was written"
    )


def _metric_lines(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Complete lines with what they hold; a last one without its line end was cut off by a kill."""
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError("step is not an integer")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}, line {number}: expected an object with a step ({error})") from error
        yield line, record


def _number(name: str, value: Any) -> float:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"metric {name!r} is {value!r}, expected a number or one-element tensor") from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also covers bytes that are not UTF-8
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def _write_json(file: Path, content: Any) -> None:
    write_atomically(file, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
