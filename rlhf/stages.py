"""A plan of stages in one directory: run, remembered, continued, with one line printed for each.

The directory holds a folder per stage and `pipeline.json`, which says with what settings it runs and which stages are
finished. Started again with the same settings it goes on where it stopped.
"""

import contextlib
import dataclasses
import json
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from . import locks
from .checkpoint import last_checkpoint, write_json
from .disk import json_bytes, read_object, write_bytes
from .settings import nearest

STATE = "pipeline.json"


def duration(seconds: float) -> str:
    """Seconds for people: '8 s', '1 min 20 s', '2 h 05 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of the plan: its folder's name, its title for people, and how long it should take (None: unknown)."""

    name: str
    title: str
    seconds: float | None = None


class Stages:
    """Runs a plan of stages in one directory, remembers what is finished, and prints one line for each.

    Args:
        output_dir: the pipeline's directory.
        plan: all stages, in order.
        config: settings that must be the same when the run is continued; plain JSON values.
        overwrite: remove another run that is in the way.
        quiet: what the stages print goes to `<output_dir>/log.txt`; False lets their progress bars through.
    Raises:
        ValueError: output_dir holds a run with other settings, or files that are no run, or another process runs there.
    """

    def __init__(self, output_dir, plan: Sequence[Stage], config: dict, *, overwrite: bool = False, quiet: bool = True):
        self.path, self.plan, self.quiet = Path(output_dir).expanduser(), list(plan), quiet
        self.config = json.loads(json.dumps(config, default=str))
        self.spent = self.expected = 0.0
        if not self.path.exists() or self.path.is_dir():
            locks.hold(self.path)
        weakref.finalize(self, locks.release, self.path)
        if overwrite and (self.path / STATE).exists():
            self._empty()
        self.finished: dict[str, dict] = self._read_state()
        self._write_state()

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != locks.LOCK:
                entry.unlink()

    def _read_state(self) -> dict:
        if self.path.is_dir() and {entry.name for entry in self.path.iterdir()} <= {locks.LOCK}:
            return {}
        remedy = "choose another --output_dir, or remove it with --overwrite"
        if not (self.path / STATE).exists():
            raise ValueError(f"output_dir {str(self.path)!r} is not empty and holds no pipeline: choose another one")
        state = read_object(self.path / STATE)
        if not state.keys() >= {"config", "finished"}:
            raise ValueError(f"{self.path / STATE}: is not what a pipeline wrote: {remedy}")
        before = state["config"]
        other = sorted(key for key in before.keys() | self.config.keys() if before.get(key) != self.config.get(key))
        if other:
            which = ", ".join(other)
            raise ValueError(
                f"output_dir {str(self.path)!r} already holds a run with other settings ({which}): {remedy}"
            )
        return state["finished"]

    def _write_state(self) -> None:
        write_json(self.path / STATE, {"config": self.config, "finished": self.finished})

    def folder(self, name: str) -> Path:
        return self.path / name

    @property
    def seconds(self) -> float:
        """Time spent on finished stages, in this and earlier starts."""
        return sum(entry["seconds"] for entry in self.finished.values())

    def time_left(self) -> float | None:
        """Expected seconds of the stages still to run: the plan's, scaled by how fast this machine has been so far."""
        rest = [stage.seconds for stage in self.plan if stage.name not in self.finished]
        if any(seconds is None for seconds in rest):
            return None
        pace = min(max(self.spent / self.expected, 0.2), 20.0) if self.expected else 1.0
        return pace * sum(rest)

    def run(self, name: str, work: Callable[[Path], str]) -> None:
        """Run `work(folder)` unless it is finished; it returns a few words about the outcome for the stage's line."""
        number = next(i for i, stage in enumerate(self.plan, 1) if stage.name == name)
        stage = self.plan[number - 1]
        head = f"[{number}/{len(self.plan)}] {stage.title}"
        if name in self.finished:
            entry = self.finished[name]
            print(f"{head}: {entry['text']}; done before, in {duration(entry['seconds'])}", flush=True)
            return
        start = time.perf_counter()
        with self._ticking(head, stage, start), self._captured():
            text = work(self.folder(name))
        seconds = time.perf_counter() - start
        self.finished[name] = {"seconds": seconds, "text": text}
        self._write_state()
        if stage.seconds is not None:
            self.spent, self.expected = self.spent + seconds, self.expected + stage.seconds
        left = self.time_left()
        more = f", about {duration(left)} left" if left else ""
        print(f"{head}: {text}; {duration(seconds)}{more}", flush=True)

    @contextlib.contextmanager
    def _captured(self):
        if not self.quiet:
            yield
            return
        with (
            open(self.path / "log.txt", "a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            yield

    @contextlib.contextmanager
    def _ticking(self, head: str, stage: Stage, start: float):
        """On a terminal: the line of the running stage, counting seconds. Elsewhere nothing."""
        if not self.quiet:
            print(head, flush=True)
        if not self.quiet or not sys.stdout.isatty():
            yield
            return
        out, done = sys.stdout, threading.Event()

        def tick():
            while not done.wait(0.5):
                about = f" of about {duration(stage.seconds)}" if stage.seconds else ""
                out.write(f"\r\033[K{head}: {duration(time.perf_counter() - start)}{about}")
                out.flush()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            out.write("\r\033[K")


def check_names(section: str, names, known) -> None:
    """Raise ValueError for the first of `names` that is not known, with the ones that look like it."""
    for name in names:
        if name not in known:
            raise ValueError(f"{section}: there is no setting {name!r}{nearest(str(name), sorted(known))}")


def settings_of(config_class) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class) if field.init}


def make_config(config_class, section: str, *layers: dict):
    """An instance of a stage's config from layers of settings, later ones winning.

    Raises:
        ValueError: a setting that the stage does not know, or a value that it does not take.
    """
    merged = {key: value for layer in layers for key, value in layer.items()}
    check_names(section, merged, settings_of(config_class))
    try:
        return config_class(**merged)
    except ValueError as error:
        raise ValueError(f"{section}: {error}") from None


def fresh_or_resumed(folder: Path) -> dict:
    """Settings that let a stage go on from its newest checkpoint; an interrupted stage without one starts anew."""
    if last_checkpoint(folder):
        return {"resume_from_checkpoint": "true"}
    if folder.exists():
        shutil.rmtree(folder)
    return {}


def write_rows(path: Path, rows: Sequence[dict]) -> Path:
    """Write rows as jsonl, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [{key: value for key, value in row.items() if key != "at"} for row in rows]
    write_bytes(path, b"".join(map(json_bytes, kept)))
    return path
