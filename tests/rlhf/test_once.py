"""What one process of a machine makes for all: the others wait, and what goes wrong on one of them stops all."""

import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf.data import DataError
from rlhf.errors import RunError
from rlhf.training import stage
from tests.processes import run
from tests.tiny import model_folder, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def on_two_processes(monkeypatch, make):
    """[what `once` gave or raised on the process], with threads for the processes of one machine."""
    barrier, told, results = threading.Barrier(2, timeout=30), {}, [None, None]

    def gather(values):
        told[threading.current_thread().name] = values
        barrier.wait()
        found = [value for name in sorted(told) for value in told[name]]
        barrier.wait()
        return found

    def process(rank):
        state = SimpleNamespace(num_processes=2, is_local_main_process=rank == 0)
        try:
            results[rank] = stage.once(state, lambda: make(rank))
        except Exception as error:
            results[rank] = error

    monkeypatch.setattr(stage, "gather_object", gather)
    threads = [threading.Thread(target=process, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_the_main_process_of_a_machine_is_first(monkeypatch):
    order = []
    results = on_two_processes(monkeypatch, lambda rank: order.append(rank) or f"made by {rank}")
    assert order == [0, 1] and results == ["made by 0", "made by 1"]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_is_an_error_of_all(monkeypatch, failing):
    asked = []

    def make(rank):
        asked.append(rank)
        if rank == failing:
            raise DataError("rows.jsonl:3: is not\nJSON")
        return rank

    results = on_two_processes(monkeypatch, make)
    assert isinstance(results[failing], DataError) and str(results[failing]) == "rows.jsonl:3: is not\nJSON"
    assert isinstance(results[1 - failing], RunError)
    assert str(results[1 - failing]) == f"process {failing}: rows.jsonl:3: is not JSON"
    assert asked == ([0] if failing == 0 else [0, 1])


def test_one_process_needs_nobody(monkeypatch):
    monkeypatch.setattr(stage, "gather_object", None)
    assert stage.once(SimpleNamespace(num_processes=1), lambda: 7) == 7


RANK = """
import os, sys
from rlhf.data import encoders, large
from rlhf.sft import SFTConfig, train_sft
large.BYTES = encoders.LARGE = 1
packed = encoders._packed
def counted(*args):
    with open(f"{sys.argv[3]}.encoded", "a") as file:
        file.write(os.environ["RANK"])
    return packed(*args)
encoders._packed = counted
train_sft(SFTConfig(model_name_or_path=sys.argv[1], dataset_name=sys.argv[2], output_dir=sys.argv[3], use_cpu=True,
    disable_tqdm=True, max_steps=1, dataset_num_proc=2, num_samples=0))
"""


@pytest.mark.slow
@pytest.mark.parametrize("bad", [False, True])
def test_two_processes_of_a_machine_encode_once(tmp_path, bad):
    rows = [{"prompt": f"a {n}", "completion": "b c"} for n in range(40)]
    rows[7] = {"prompt": "a"} if bad else rows[7]
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "rank.py"]
    command += [model_folder(tmp_path / "policy"), write_jsonl(tmp_path / "rows.jsonl", rows), str(tmp_path / "run")]
    done = run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT), "RLHF_CACHE": str(tmp_path / "cache")}, cwd=tmp_path
    )
    if bad:
        assert done.returncode != 0 and done.stderr.count("rows.jsonl:8: lacks the field `completion`") >= 2
        assert "RunError: process 0:" in done.stderr
        return
    assert done.returncode == 0, done.stderr[-3000:]
    assert set((tmp_path / "run.encoded").read_text()) == {"0"}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["summary"]
