"""How a submission came about, kept beside it: the setting that its scores must be named with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fq.provenance import provenance
from fq.run import write_atomically

DATASETS = ("r2r", "r4r", "rxr", "ndh", "hanna")


def provenance_file(submission: str | Path) -> Path:
    """Where the provenance of a submission is."""
    return Path(f"{submission}.provenance.json")


def write_provenance(submission: str | Path, setting: str, details: Mapping[str, Any]) -> None:
    """Record how a submission was made.

    Args:
        submission: as it was written.
        setting: greedy, search or pre-explored.
        details: plain values.
    """
    record = provenance(0) | {"setting": setting, "sha256": _digest(submission), **details}
    write_atomically(provenance_file(submission), json.dumps(record, indent=1) + "\n")


def setting_of(submission: str | Path) -> str | None:
    """Setting that a submission was made in, if that is known of this very content.

    Raises:
        ValueError: the record is damaged.
    """
    return _told(submission, "setting")


def dataset_of(submission: str | Path) -> str | None:
    """Data set whose items were walked for a submission, if that is known of this very content.

    Raises:
        ValueError: the record is damaged.
    """
    dataset = _told(submission, "dataset")
    if dataset not in (None, *DATASETS):
        file = provenance_file(submission)
        raise ValueError(f"{file} is damaged: delete it, or walk the agent again (dataset {dataset!r})")
    return dataset


def _told(submission: str | Path, name: str) -> str | None:
    file = provenance_file(submission)
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        # Records of earlier versions name no data set.
        digest, value = record["sha256"], record["setting"] if name == "setting" else record.get(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: delete it, or walk the agent again ({error!r})") from error
    return str(value) if value is not None and digest == _digest(submission) else None


def _digest(submission: str | Path) -> str:
    return hashlib.sha256(Path(submission).read_bytes()).hexdigest()
