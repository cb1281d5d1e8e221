"""Files of a run that are either whole or absent: directories written aside and renamed, logs that resume, RNG state.

Layout of a run directory (every stage): `metrics.jsonl`, `samples.jsonl`, `run.json`, the final model in the Hugging
Face layout, and `checkpoint-N/` after N steps; of PPO, where N counts iterations, also `checkpoint-N-U/`, U optimizer
steps into the next one. A directory counts as a checkpoint when it holds `trainer_state.json`, which is written last,
so that a run killed while saving never leaves something that looks like a checkpoint.
"""

import contextlib
import json
import logging
import os
import random
import re
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch

from . import locks
from .disk import TEMPORARY_NAME, append_bytes, fsync, json_bytes, lines_of, temporary_name, write_bytes, writing

logger = logging.getLogger("rlhf")
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?")
RUN_MARKERS = ("metrics.jsonl", "run.json", "samples.jsonl", "trainer_state.json", "config.json", "model.safetensors")


def _fsync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        fsync(path)
    fsync(directory)


def let_others_read(directory: Path) -> None:
    """Give the files in a directory the permissions that the umask gave it; safetensors writes for the owner only.

    The umask itself cannot be read without setting it, for all threads.
    """
    allowed = stat.S_IMODE(directory.stat().st_mode) & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | allowed)


@contextlib.contextmanager
def atomic_directory(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary directory beside `path`; on success its content becomes `path`, on failure it is removed.

    A `path` that does not exist appears by one rename. Where it exists already, the new files are moved into it one
    by one (each move is atomic, `config.json` and `trainer_state.json` last) and other files stay; with `replace` the
    old directory is renamed away and removed instead.

    Args:
        path: directory to make.
        replace: drop what an existing directory holds.
    Raises:
        OSError: the disk is full or not writable; nothing is left behind.
    Example:
        >>> import tempfile
        >>> home = Path(tempfile.mkdtemp())
        >>> with atomic_directory(home / "checkpoint-1") as directory:
        ...     _ = (directory / "trainer_state.json").write_text("{}")
        >>> last_checkpoint(home).name
        'checkpoint-1'
    """
    path = Path(os.path.realpath(path))  # of a link, what it points to: a rename cannot leave the file system
    with writing(path):
        merge = path.is_dir() and not replace
        home = path if merge else path.parent
        home.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(home, path.name)
        temporary = home / temporary_name(path.name)
        temporary.mkdir()
        try:
            yield temporary
            let_others_read(temporary)
            _fsync_tree(temporary)
            if merge:
                _merge(temporary, path)
            else:
                _put_in_place(temporary, path)
            fsync(home)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.rename(temporary, path)
        return
    old = temporary.with_name(temporary.name + "-old")
    os.rename(path, old)
    os.rename(temporary, path)
    shutil.rmtree(old)


def _remove_leftovers(home: Path, name: str) -> None:
    """Remove what processes left that were killed while they wrote `name`."""
    start = temporary_name(name).removesuffix(str(os.getpid()))
    for entry in home.iterdir():
        process, _, old = entry.name.removeprefix(start).partition("-")
        if entry.name.startswith(start) and process.isdigit() and old in ("", "old") and not _is_alive(int(process)):
            shutil.rmtree(entry, ignore_errors=True)


def _is_alive(process: int) -> bool:
    """Whether a process other than this one goes by that number."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _merge(source: Path, target: Path) -> None:
    last = ("config.json", "trainer_state.json")
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.name in last, entry.name)):
        if entry.is_dir() and (target / entry.name).is_dir():
            _merge(entry, target / entry.name)
        else:
            os.replace(entry, target / entry.name)
    fsync(target)


def write_json(path: str | Path, value) -> None:
    """Write `value` as JSON to `path`; a reader sees the old or the new content. NaN and infinite numbers become null.

    Raises:
        WriteError: names the path and the cause.
    """
    write_bytes(path, json_bytes(value, indent=2))


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the complete checkpoints of a run directory, oldest first."""
    found = []
    if Path(output_dir).is_dir():
        for path in Path(output_dir).iterdir():
            match = CHECKPOINT_NAME.fullmatch(path.name)
            if match and (path / "trainer_state.json").is_file():
                found.append((int(match[1]), -1 if match[2] is None else int(match[2]), path))
    return [path for *_, path in sorted(found)]


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest complete `checkpoint-N` of a run directory, or None."""
    return (checkpoints(output_dir) or [None])[-1]


def remove_old_checkpoints(output_dir: str | Path, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints, and any inside an iteration but the newest; None keeps all."""
    if keep is not None:
        found = checkpoints(output_dir)
        between = [path for path in found if CHECKPOINT_NAME.fullmatch(path.name)[2] is None]
        for path in found[:-1]:
            if path not in between[-max(keep, 1) :]:
                remove_directory(path)


def remove_directory(path: Path) -> None:
    """Remove a directory so that a kill on the way leaves no half of it under its name."""
    aside = path.with_name(temporary_name(path.name) + "-old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    if aside.is_symlink():
        aside.unlink()  # a checkpoint that was moved to another disk stays there
    else:
        shutil.rmtree(aside)


def refuse_file(output_dir: str | Path) -> None:
    """Raise ValueError where a run directory is to be, and a file is, or a link that leads nowhere."""
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir: {path} is a file; give a directory")
    if path.is_symlink() and not path.exists():
        raise ValueError(f"output_dir: {path} is a link to {os.readlink(path)}, which is not there; give a directory")


def prepare_output_dir(output_dir: str | Path, *, resume: bool) -> Path:
    """Make the run directory and take its lock; refuse one that holds another run, unless that is to be resumed.

    Leftovers of an interrupted save are removed. `locks.release(output_dir)` gives the lock back.

    Raises:
        ValueError: `output_dir` is a file, or another process writes there, or it holds a run and `resume` is false.
    """
    path = Path(output_dir)
    refuse_file(path)
    locks.hold(path)
    if not resume:
        markers = [name for name in RUN_MARKERS if (path / name).exists()]
        markers += sorted(entry.name for entry in path.iterdir() if CHECKPOINT_NAME.fullmatch(entry.name))
        if markers:
            locks.release(path)
            raise ValueError(
                f"output_dir: {path} already holds a run ({', '.join(markers[:3])}); give another directory, remove "
                "it, or continue that run with --resume_from_checkpoint true (in Python: True)"
            )
    elif last_checkpoint(path) is None:
        logger.warning("there is no checkpoint in %s: the run starts from the beginning", path)
    for entry in path.iterdir():
        if TEMPORARY_NAME.fullmatch(entry.name):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return path


def wants_resume(resume_from_checkpoint) -> bool:
    """Tell whether the option asks to continue a run: not None, false, no, 0 or empty."""
    return str(resume_from_checkpoint).lower() not in ("", "none", "false", "no", "0")


def resolve_checkpoint(output_dir: str | Path, resume_from_checkpoint) -> Path | None:
    """Return the checkpoint that `resume_from_checkpoint` means: None or false, true (the newest), or a path.

    true where there is no checkpoint yet means a start from the beginning, so that a job that is queued again may
    always say true; unless a finished run would be lost by it.

    Raises:
        ValueError: the path is not a complete checkpoint; true, and there is a finished run without a checkpoint.
    """
    wanted = resume_from_checkpoint
    if not wants_resume(wanted):
        return None
    if str(wanted).lower() in ("true", "yes", "1"):
        newest = last_checkpoint(output_dir)
        if newest is None and (Path(output_dir) / "model.safetensors").exists():
            raise ValueError(
                f"resume_from_checkpoint: got {wanted}, but {output_dir} holds a finished run and no checkpoint to go "
                "on from; give another output_dir, or remove it"
            )
        return newest
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint: {wanted} is not a complete checkpoint (no trainer_state.json in it)")
    return Path(wanted)


class JsonLines:
    """A file of one JSON object a line with a "step"; opened with `resume_step`, later and torn lines are dropped."""

    def __init__(self, path: str | Path, *, resume_step: int | None = None):
        self.path = Path(path)
        if resume_step is not None and self.path.exists():
            kept = []
            for line in lines_of(self.path):
                with contextlib.suppress(json.JSONDecodeError):
                    if line.endswith("\n") and json.loads(line)["step"] <= resume_step:
                        kept.append(line)
            write_bytes(self.path, "".join(kept).encode("utf-8"))

    def append(self, rows: list[dict]) -> None:
        """Append rows at once: a kill leaves at most one torn last line, a full disk none.

        Raises:
            WriteError: names the file and the cause.
        """
        append_bytes(self.path, b"".join(map(json_bytes, rows)))


class MetricsLog:
    """`metrics.jsonl` of a run: one line `{"step": int, "time": s, **metrics}` for each call of `log`.

    Args:
        output_dir: the run directory.
        resume_step: the checkpoint's step; lines after it are dropped. None for a new run.
    """

    def __init__(self, output_dir: str | Path, *, resume_step: int | None = None):
        self.lines = JsonLines(Path(output_dir) / "metrics.jsonl", resume_step=resume_step)
        self.start = time.perf_counter()

    def log(self, step: int, metrics: dict) -> None:
        """Append the metrics of a step; numbers that are not finite are written as null (JSON has no NaN)."""
        row = {"step": int(step), "time": round(time.perf_counter() - self.start, 3)}
        row |= {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        self.lines.append([row])

    def last(self) -> dict:
        """Return the metrics of the newest line, {} without one."""
        lines = lines_of(self.lines.path) if self.lines.path.exists() else []
        row = json.loads(lines[-1]) if lines else {}
        return {name: value for name, value in row.items() if name not in ("step", "time")}


def rng_state() -> dict:
    """Return the state of Python's, numpy's and torch's random generators, in types that torch.load takes safely."""
    name, keys, position, has_gauss, gauss = numpy.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict) -> None:
    """Put back what `rng_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
