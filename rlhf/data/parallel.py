"""Work on large data in several processes, which take over what this one holds as it is (fork)."""

import contextlib
import ctypes
import gc
import itertools
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from ..errors import RunError

AHEAD = 3  # tasks for each process that are under way at once
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
TOKENIZERS = "TOKENIZERS_PARALLELISM"
_function = None
_share = True


def processes(given: int | None = None) -> int:
    """How many processes work on large data: `given`, else one for each core that this process may use.

    Processes that were started together on this machine (torchrun) share the cores, unless the others wait.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    started = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if _share else 1
    return given or max(1, cores // started)


@contextlib.contextmanager
def others_wait(waiting: bool):
    """Say that the processes which were started with this one wait for what it does inside the block."""
    global _share
    before, _share = _share, not waiting
    try:
        yield
    finally:
        _share = before


def in_order(function, tasks, *, count: int, prepare=None):
    """Yield `function(task)` of each task, in their order.

    The processes hold what this one holds, so `function` may be anything; tasks and results travel. They must not use
    torch, whose threads they have not. Where there is no such fork (not on Linux), all is done in this process.

    Args:
        count: processes; 1 = this one.
        prepare: called in each new process before its first task.
    Raises:
        RunError: a process ended before its work was done.
    """
    if count < 2 or not sys.platform.startswith("linux") or multiprocessing.current_process().daemon:
        yield from map(function, tasks)
        return
    tasks, pending = iter(tasks), deque()
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(function, os.getpid(), prepare))
    try:
        with _forking():
            pending.extend(pool.submit(_call, task) for task in itertools.islice(tasks, 1))  # starts all processes
        pending.extend(pool.submit(_call, task) for task in itertools.islice(tasks, AHEAD * count - 1))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(_call, task) for task in itertools.islice(tasks, 1))
            yield result
    except BrokenProcessPool:
        raise RunError(
            "dataset_num_proc: a process that worked on the data was ended from outside, as where memory runs out; "
            f"it was one of {count}, give fewer (--dataset_num_proc 1)"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _forking():
    """Without warnings that are about what the new processes do not do: use torch's or the tokenizer's threads."""
    before = os.environ.get(TOKENIZERS)
    os.environ[TOKENIZERS] = "false"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        os.environ.pop(TOKENIZERS) if before is None else os.environ.update({TOKENIZERS: before})


def _begin(function, parent, prepare):
    """A new process starts: signals of the terminal are for its parent, and it ends when that does."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    if prepare is not None:
        prepare()
    gc.freeze()  # or the first collection would write to, and so copy, all memory that is shared with the parent


def _call(task):
    return _function(task)


@contextlib.contextmanager
def progress(total, what, unit, *, disable=False):
    """A bar on a terminal: yields a function that tells how much more is done."""
    from tqdm import tqdm

    scale = {"unit": unit, "unit_scale": True, "dynamic_ncols": True}
    with tqdm(total=total, desc=what, leave=False, disable=True if disable else None, **scale) as bar:
        yield bar.update
