"""A resumed run must be the run that wrote the checkpoint: what both are compared by, and how a difference is told."""

import hashlib
import json
from pathlib import Path

GOES_ON = "(resume_from_checkpoint goes on with the same run only)"


def digest(rows) -> str:
    """A short name of the content of some rows, the same for equal rows."""
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()[:16]


def check_same_run(theirs: dict, ours: dict, directory: Path, data: tuple[str, ...]) -> None:
    """Compare what the checkpoint in `directory` says of its run with what this run is.

    Args:
        theirs, ours: {setting: value}; of those in `data` the value is the digest of the rows.
    Raises:
        ValueError: names every setting that differs, and both values.
    """
    different = [name for name in theirs if name in ours and theirs[name] != ours[name]]
    if different:
        lines = [
            f"{name}: holds other rows than when {directory} was written"
            if name in data
            else f"{name}: {directory} was written by a run with {theirs[name]!r}, this run has {ours[name]!r}"
            for name in different
        ]
        raise ValueError("; ".join(lines) + f" {GOES_ON}")
