"""Work in forked processes: results in order, errors that say what happened, nobody left behind."""

import os
import signal
import subprocess
import sys
import time
import warnings

import pytest

from rlhf.data import parallel
from rlhf.errors import RunError
from tests.rlhf.test_disk import ROOT


def test_results_come_in_order_and_from_several_processes():
    held = {"by": 10}  # taken over, not sent

    def work(number):
        time.sleep(0.02 if number == 0 else 0.001)
        return number * held["by"], os.getpid()

    found = list(parallel.in_order(work, iter(range(40)), count=2))
    assert [value for value, _ in found] == [10 * number for number in range(40)]
    processes = {process for _, process in found}
    assert len(processes) == 2 and os.getpid() not in processes
    alone = list(parallel.in_order(work, range(3), count=1))
    assert {process for _, process in alone} == {os.getpid()}
    assert list(parallel.in_order(work, [], count=2)) == []


def test_few_tasks_are_taken_ahead_of_the_results():
    taken = []

    def tasks():
        for number in range(1000):
            taken.append(number)
            yield number

    results = parallel.in_order(lambda number: number, tasks(), count=2)
    assert next(results) == 0 and len(taken) <= 2 * parallel.AHEAD + 1
    results.close()


def test_the_processes_have_no_tokenizer_threads_and_no_handlers_of_their_parent():
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (found,) = parallel.in_order(
                lambda _: (
                    os.environ["TOKENIZERS_PARALLELISM"],
                    signal.getsignal(signal.SIGTERM),
                    signal.getsignal(signal.SIGINT),
                ),
                [0],
                count=2,
            )
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert found == ("false", signal.SIG_DFL, signal.SIG_IGN)
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_an_error_of_the_work_comes_back():
    def work(number):
        if number == 3:
            raise ValueError("row 3")
        return number

    results = parallel.in_order(work, range(100), count=2)
    with pytest.raises(ValueError, match="row 3"):
        list(results)


def test_a_process_that_is_ended_from_outside_is_told():
    def work(number):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(RunError, match=r"dataset_num_proc: a process .* it was one of 2.*--dataset_num_proc 1"):
        list(parallel.in_order(work, range(100), count=2))


ENDS_AT_ONCE = """
import os, signal, sys, time
from rlhf.data import parallel
def work(number):
    os.write(1, f"{os.getpid()}\\n".encode())  # in one piece, which print does not promise
    time.sleep(60)
for _ in parallel.in_order(work, range(10), count=2):
    pass
"""


def test_processes_end_with_their_parent():
    with subprocess.Popen(
        [sys.executable, "-c", ENDS_AT_ONCE], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ
    ) as parent:
        try:
            workers = [int(parent.stdout.readline()) for _ in range(2)]
        finally:
            parent.kill()
    for _ in range(500):
        if not any(map(_is_alive, workers)):
            break
        time.sleep(0.01)
    assert not any(map(_is_alive, workers))


def _is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_processes_that_were_started_together_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert parallel.processes() == 12 and parallel.processes(3) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert parallel.processes() == 3
    with parallel.others_wait(True):
        assert parallel.processes() == 12
    assert parallel.processes() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "40")
    assert parallel.processes() == 1
