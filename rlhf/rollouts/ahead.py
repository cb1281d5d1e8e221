"""Samples drawn ahead: an engine elsewhere draws those of the next iteration in a thread while this one trains.

One batch at a time. The thread asks the engine and puts the answer in order; it touches no weights and no collective
operation of the processes, each of which has a thread of its own. It is a daemon: a process that ends does not wait for
an engine that does not answer.
"""

import concurrent.futures
import dataclasses
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from .sampling import Rollouts

FILE = "ahead.json"
WAKE = 0.5  # seconds, after which a waiting main thread looks for signals that came to another thread


@dataclass
class Drawn:
    """Samples of prompts, and how long the engine took for them."""

    rows: list[int]  # number of each response's prompt in the data
    rollouts: Rollouts
    seconds: float


class Ahead:
    """The batch that is being drawn, or that waits to be taken; false while there is none.

    Example:
        >>> ahead = Ahead()
        >>> ahead.start([7], lambda: Rollouts([[1, 2]], [[3]], [False]))
        >>> bool(ahead), ahead.take().rollouts.response_ids, bool(ahead)
        (True, [[3]], False)
    """

    def __init__(self, drawn: Drawn | None = None):
        self.rows, self._future = None, None
        self.waited = 0.0  # seconds that `wait` took for this batch
        if drawn is not None:
            self.rows, self._future = drawn.rows, Future()
            self._future.set_result(drawn)

    def __bool__(self) -> bool:
        return self._future is not None

    def start(self, rows: list[int], draw: Callable[[], Rollouts]) -> None:
        """Call `draw` in a thread.

        Raises:
            RuntimeError: the batch before has not been taken.
        """
        if self:
            raise RuntimeError("samples are drawn ahead of one iteration only, and those before have not been taken")
        self.rows, self._future, self.waited = rows, Future(), 0.0
        arguments = (self._future, rows, draw)
        threading.Thread(target=_run, args=arguments, name="rollout-ahead", daemon=True).start()

    def wait(self) -> Drawn:
        """Return the batch when it is there; a signal whose handler raises ends the wait.

        Raises:
            Exception: what `draw` raised, with the trace of its thread.
        """
        begun = time.perf_counter()
        while not self._future.done():
            concurrent.futures.wait([self._future], timeout=WAKE)
        self.waited += time.perf_counter() - begun
        return self._future.result()

    def take(self) -> Drawn:
        """The same, and let go of it."""
        drawn = self.wait()
        self.rows = self._future = None
        return drawn


def _run(future: Future, rows: list[int], draw: Callable[[], Rollouts]) -> None:
    begun = time.perf_counter()
    try:
        rollouts = draw()
    except BaseException as error:  # the thread that waits raises it
        future.set_exception(error)
    else:
        future.set_result(Drawn(rows, rollouts, time.perf_counter() - begun))


def save_ahead(drawn: list[Drawn | None], folder: Path) -> None:
    """Write the batches of all processes to a checkpoint's folder, as `ahead.json`; nothing where there are none."""
    if None not in drawn:
        texts = [dataclasses.asdict(batch) for batch in drawn]
        (folder / FILE).write_text(json.dumps(texts) + "\n", encoding="utf-8")


def load_ahead(folder: Path, rank: int) -> Ahead:
    """Return the batch of process `rank` that a checkpoint holds, if it holds any."""
    if not (folder / FILE).exists():
        return Ahead()
    batch = json.loads((folder / FILE).read_text(encoding="utf-8"))[rank]
    return Ahead(Drawn(**batch | {"rollouts": Rollouts(**batch["rollouts"])}))
