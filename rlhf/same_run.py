"""A resumed run must be the run that wrote the checkpoint: what both are compared by, and how a difference is told."""

import hashlib
import json
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

GOES_ON = "(resume_from_checkpoint goes on with the same run only)"
SAMPLED = 64
"""Numbers of each tensor that `weights_digest` reads."""


def digest(rows) -> str:
    """A short name of the content of some rows, the same for equal rows."""
    found = hashlib.sha256(b"[")
    for number, row in enumerate(rows):  # the bytes of json.dumps(list(rows)), which are never held
        found.update((", " * (number > 0) + json.dumps(row, default=str)).encode())
    found.update(b"]")
    return found.hexdigest()[:16]


@torch.no_grad()
def weights_digest(model) -> str:
    """A short name of a model's weights, from a few numbers of each of them: of other weights it is another one.

    Of weights that FSDP2 has cut all processes call, and get the name of the whole ones.
    """
    found = hashlib.sha256(str(getattr(model.config, "reward_bias", None)).encode())
    for name, weight in model.named_parameters():
        found.update(f"{name} {list(weight.shape)}".encode())
        if not weight.is_meta:
            weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
            some = weight.flatten()[:: max(1, weight.numel() // SAMPLED)]
            found.update(some.double().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def check_same_run(
    theirs: dict, ours: dict, directory: Path, data: tuple[str, ...], weights: tuple[str, ...] = ()
) -> None:
    """Compare what the checkpoint in `directory` says of its run with what this run is.

    Args:
        theirs, ours: {setting: value}; of those in `data` the value is the digest of the rows, of those in `weights`
            the digest of the model.
    Raises:
        ValueError: names every setting that differs, and both values.
    """
    different = [name for name in theirs if name in ours and theirs[name] != ours[name]]
    if different:
        held = dict.fromkeys(data, "rows") | dict.fromkeys(weights, "weights")
        lines = [
            f"{name}: holds other {held[name]} than when {directory} was written"
            if name in held
            else f"{name}: {directory} was written by a run with {theirs[name]!r}, this run has {ours[name]!r}"
            for name in different
        ]
        raise ValueError("; ".join(lines) + f" {GOES_ON}")
