"""benchmarks/gpu.sh, gpu_compare.sh and gpu.py without a GPU: steps, files, order of calls; nothing is timed."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_compare, gpu_rows, gpu_timing

ROOT = Path(__file__).resolve().parent.parent
STEPS = ["build", "backends", "check", "table", "tests", "profile", "memcheck", "racecheck", "initcheck", "compile"]
FILES = 8  # that OUTDIR may hold
# Stands for Python, compute-sanitizer and ncu: says what it was called with; fails if that holds $FAILING.
STUB = """#!/bin/bash
case "$*" in *"import sys, torch"*) echo 90a; exit ;; esac
told="caching=${PYTORCH_NO_CUDA_MEMORY_CACHING:-} backend=${RLHF_KERNELS_BACKEND:-} archs=${RLHF_KERNELS_CUDA_ARCHS:-}"
echo $(basename "$0") "$@" "[$told]" >>"$CALLS"
case "$*" in *"benchmarks.gpu "*--calls*) echo "gae 4x5 cuda 1.0 ms 50% of the roof"; echo '{}' >"$3/h200.json" ;; esac
case "$*" in *"$FAILING"*) exit 3 ;; esac
"""


def run(script, arguments, **environment):
    command = ["bash", str(ROOT / "benchmarks" / script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}
    )


@pytest.fixture
def stubbed(tmp_path):
    """stubbed(script, arguments, failing) runs a script whose programs are stubs: (the finished run, their calls)."""
    for name in ("python", "compute-sanitizer", "ncu"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        program = tmp_path / "bin" / name
        program.write_text(STUB)
        program.chmod(program.stat().st_mode | stat.S_IEXEC)

    def call(script, arguments, failing="nothing"):
        calls = tmp_path / "calls"
        calls.write_text("")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = run(script, arguments, PATH=path, PYTHON="python", CALLS=str(calls), FAILING=failing)
        return done, calls.read_text().splitlines()

    return call


def limits(output):
    return {name: int(seconds) for name, seconds in re.findall(r"^== (\w+), at most (\d+) s", output, re.MULTILINE)}


def test_dry_run(tmp_path):
    """Every step is said in its order, and the real programs take their arguments."""
    done = run("gpu.sh", ["--dry-run", tmp_path / "out"], PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    found = limits(done.stdout)
    assert list(found) == STEPS
    assert sum(found.values()) - found["build"] <= 330
    assert "dry run: check" in done.stdout and "dry run: ['compile'] of ['logprobs'" in done.stdout
    collected = int(re.search(r"(\d+)/\d+ tests collected", done.stdout)[1])
    assert collected >= 20  # on a machine with a GPU also the op tests
    assert len(list((tmp_path / "out").iterdir())) <= FILES


def test_usage(tmp_path):
    for script in ("gpu.sh", "gpu_compare.sh"):
        done = run(script, [])
        assert done.returncode == 2 and f"benchmarks/{script} [--dry-run]" in done.stderr


def test_steps(stubbed, tmp_path):
    """Modules that import are not built; what a sanitizer needs is set for it alone; at most eight files come back."""
    done, calls = stubbed("gpu.sh", [tmp_path / "out"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(limits(done.stdout)) == STEPS[1:] and "the native modules are there" in done.stdout
    assert not any("setup.py" in call for call in calls) and all("archs=90a" in call for call in calls)
    sanitized = [call for call in calls if call.startswith("compute-sanitizer")]
    assert ["--tool " + name in call for name, call in zip(STEPS[6:9], sanitized, strict=True)] == [True] * 3
    assert all("--report-api-errors no" in call and "caching=1" in call for call in sanitized)
    assert ["backend=cuda" in call for call in sanitized] == [False, True, False]
    assert not any("caching=1" in call or "backend=cuda" in call for call in calls if call not in sanitized)
    (tests,) = (call for call in calls if "-m pytest" in call)
    assert "-n 12" in tests and "--maxfail" not in tests and "tests/kernels/test_linear.py" in tests
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"log.txt", "table.txt", "h200.json"}
    assert "of the roof" in (tmp_path / "out" / "table.txt").read_text()


@pytest.mark.parametrize(
    ("failing", "code"),
    (("import _cpu", 0), ("setup.py", 0), ("--check", 1), ("--calls ours", 1), ("pytest", 1), ("--profile", 0),
     ("--tool racecheck", 1), ("--calls compile", 0)),
)  # fmt: skip
def test_a_step_that_fails_stops_none(stubbed, tmp_path, failing, code):
    done, calls = stubbed("gpu.sh", [tmp_path / "out"], failing)
    assert done.returncode == code, done.stdout
    assert list(limits(done.stdout)) == STEPS[failing != "import _cpu" :]
    assert any("setup.py" in call for call in calls) == (failing == "import _cpu")


def test_no_xdist(stubbed, tmp_path):
    _, calls = stubbed("gpu.sh", [tmp_path / "out"], "import xdist")
    assert not any("-n 12" in call for call in calls if "pytest" in call)


def test_two_versions(stubbed, tmp_path):
    """A commit and a folder take turns, each with its own package and the benchmarks of this checkout."""
    done, calls = stubbed("gpu_compare.sh", [ROOT, ROOT, tmp_path / "out", "--only", "kl"])
    turns = [call for call in calls if "benchmarks.gpu " in call]
    assert [re.search(r"--name (\S+) --only kl", call)[1] for call in turns] == list(gpu_compare.TURNS)
    assert done.returncode == 0 and f"benchmarks.gpu_compare {tmp_path / 'out'} {ROOT} {ROOT}" in calls[-1]
    assert len(list((tmp_path / "out").iterdir())) <= FILES
    done, calls = stubbed("gpu_compare.sh", [ROOT, ROOT, tmp_path / "out"], "--name b-1")
    assert done.returncode == 1 and sum("--calls ours --seconds" in call for call in calls) == 4
    done, calls = stubbed("gpu_compare.sh", ["--dry-run", ROOT, ROOT, tmp_path / "out"])
    assert done.returncode == 0 and len(calls) == 5 and all("--dry-run" in call for call in calls)


def test_versions_side_by_side(tmp_path):
    for name, ms in (("a-1", 2.0), ("b-1", 1.0), ("a-2", 2.2), ("b-2", 1.05)):
        rows = {"cuda": {"ms": ms}, "triton": {"ms": 3.0 if name != "b-1" else 3.3}, "eager": {"failed": "no"}}
        calls = [{"call": "f", "shape": "4", "rows": rows}, {"call": "g", "shape": "4", "failed": "out of time"}]
        (tmp_path / f"{name}.json").write_text(json.dumps({"calls": calls}))
    cuda, triton = gpu_compare.lines(tmp_path)
    assert re.search(r"cuda +2\.0000 -> +1\.0000 ms +2\.000 x  turns apart 10\.0%$", cuda)
    assert re.search(r"triton +3\.0000 -> +3\.0000 ms +1\.000 x  turns apart 10\.0%  noise$", triton)
    (tmp_path / "b-2.json").unlink()
    assert len(gpu_compare.lines(tmp_path)) == 2
    (tmp_path / "b-1.json").unlink()
    with pytest.raises(SystemExit, match="no call of both versions"):
        gpu_compare.main([str(tmp_path), "A", "B"])


class StubCuda:
    """torch.cuda as gpu_timing uses it; every call is logged."""

    def __init__(self, milliseconds=3.0, captures=True):
        self.log, self.milliseconds, self.captures = [], milliseconds, captures

    def Event(self, enable_timing):
        return StubEvent(self)

    def CUDAGraph(self):
        return self

    def replay(self):
        self.log.append("replay")

    def stream(self, stream):
        return self

    def graph(self, graph):
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return self

    def __enter__(self):
        self.log.append("enter")

    def __exit__(self, *error):
        self.log.append("exit")

    def _sleep(self, cycles):
        self.log.append("spin")
        self.cycles = cycles

    def current_stream(self):
        return self

    Stream = current_stream

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        self.log.append("synchronize")

    def empty_cache(self):
        pass

    reset_peak_memory_stats = empty_cache

    def memory_allocated(self):
        return 0

    max_memory_allocated = memory_allocated


class StubEvent:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.device.log.append("record")

    def synchronize(self):
        self.device.log.append("wait")

    def elapsed_time(self, stop):
        return self.device.milliseconds


@pytest.fixture
def device(monkeypatch):
    stub = StubCuda()
    monkeypatch.setattr(gpu_timing, "cuda", stub)
    return stub


def test_a_call_is_enqueued_while_the_device_spins(device):
    class Flush:
        zero_ = staticmethod(lambda: device.log.append("flush"))

    assert gpu_timing.timed(lambda: device.log.append("call"), 0.0, Flush()) == 3.0
    warm_up = ["call"] * 2 + ["synchronize", "call", "synchronize"]
    assert device.log == warm_up + ["flush", "spin", "record", "call", "record", "wait"] * gpu_timing.LEAST


def test_the_device_spins_for_longer_than_the_host_needs(device, monkeypatch):
    monkeypatch.setattr(gpu_timing, "enqueued_in", lambda call: 0.004)
    gpu_timing.timed(lambda: None, 0.0, torch.empty(1))
    assert device.cycles == pytest.approx(0.009 * gpu_timing.CYCLES)
    gpu_timing.behind_a_spin(lambda: None, 1.0)
    assert device.cycles == gpu_timing.LONGEST * gpu_timing.CYCLES


def test_replays_are_of_one_graph_of_many_calls(device):
    assert gpu_timing.replayed(lambda: device.log.append("call"), count=4) == 3.0 / 4
    made = ["enter", *["call"] * 3, "exit", "enter", *["call"] * 4, "exit"]
    assert device.log == made + ["spin", "record", "replay", "record", "wait"] * gpu_timing.REPLAYS


def test_eager_and_compile_are_replayed_as_ours_are(device, capsys):
    row = gpu_rows.Row("f", "4", {}, 1.0, latency=True)
    for name in ("triton", "eager", "compile"):
        assert gpu.milliseconds(row, name, lambda: None, 0.0, torch.empty(1)) == (0.15, True)
    device.captures = False
    assert gpu.milliseconds(row, "eager", lambda: None, 0.0, torch.empty(1)) == (3.0, False)
    assert "eager is not captured" in capsys.readouterr().out
    with pytest.raises(RuntimeError):
        gpu.milliseconds(row, "triton", lambda: None, 0.0, torch.empty(1))


@pytest.fixture
def small_run(device, monkeypatch, tmp_path):
    """small_run(groups, **options): gpu.run on CPU tensors, where ours is the reference; what it wrote."""
    monkeypatch.setattr(gpu_rows, "gpu_backends", lambda op: ["reference"])
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(gpu_timing, "ceilings", lambda: (4e12, 8e14))
    monkeypatch.setattr(gpu_timing.Warmth, "up", lambda self: device.log.append("warm"))

    def call(groups, **options):
        file = gpu.run(tmp_path, groups, place=gpu_rows.Place("cpu", small=True), **options)
        return file.name, json.loads(file.read_text())

    return call


@pytest.mark.parametrize("group", [name for name in gpu_rows.GROUPS if name != "linear_columns"])
def test_rows_are_measured(small_run, device, group):
    name, data = small_run([group], calls=("ours", "eager"))
    assert name == "some-gpu.json" and data["device"] == "Some GPU" and data["copy_bytes_s"] == 4e12
    assert {call["op"] for call in data["calls"]} == {group}
    assert device.log.count("warm") == len(data["calls"])
    for call in data["calls"]:
        assert "reference" in call["rows"] and "sm_mhz" in call
        for name, figures in call["rows"].items():
            assert figures["ms"] in (3.0, 0.15), (call["call"], name, figures)
            assert figures.get("error", 0.0) < (1e-4 if name == "reference" and group != "logprobs" else 0.02)


def test_rows_are_written_one_by_one(small_run, monkeypatch, tmp_path):
    """A run that is interrupted leaves the rows before; one that is out of time says which rows are missing."""
    rows = []

    def measure(row, *_):
        if rows:
            raise KeyboardInterrupt
        rows.append(row)
        return {"floor_ms": 1.0, "rows": {"reference": {"failed": "OSError: no"}}}

    monkeypatch.setattr(gpu, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        small_run(["advantages"])
    (call,) = json.loads((tmp_path / "some-gpu.json").read_text())["calls"]
    assert call["call"] == "gae" and call["rows"]["reference"]["failed"] == "OSError: no"
    name, data = small_run(["ppo"], seconds=-1.0, name="late")
    assert name == "late.json" and {call["failed"] for call in data["calls"]} == {"out of time"}


def test_compile_alone(small_run, monkeypatch):
    """Rows without such a call are left out; an implementation that raises is a row with its reason."""
    monkeypatch.setattr(gpu_rows, "compiled", lambda function: function)
    _, data = small_run(["kl", "advantages"], calls=("compile",))
    assert [(call["op"], list(call["rows"])) for call in data["calls"]] == [("kl", ["compile"])]


def test_graphs_are_of_one_shape():
    """A function that is compiled for several shapes would get kernels of dynamic shapes from the second on."""
    source = Path(gpu_rows.__file__).read_text()
    assert "torch.compile" not in source.partition('"""\n\nfrom')[2] and "import compiled" in source


def test_forward_columns():
    linear = pytest.importorskip("rlhf_kernels.triton.linear")
    before = linear.FORWARD_COLUMNS, linear._Kernels.columns(9), linear._Kernels.backward_columns(9)
    with gpu_rows.forward_columns(7):
        assert linear._Kernels.columns(9) == 7 and linear._Kernels.backward_columns(9) == before[2]
    assert (linear.FORWARD_COLUMNS, linear._Kernels.columns(9)) == before[:2]


def test_gae_is_compared_at_the_last_tokens():
    row = next(gpu_rows.gae_rows(gpu_rows.Place("cpu", small=True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_rows, "LAST", 100)
        exact = row.exact()
    result = [torch.cat([torch.zeros(x.shape[0], 200), x.float()], dim=1) for x in exact]
    assert exact[0].shape == (4, 100) and gpu.worst(result, exact) < 1e-6


def test_arguments(capsys, tmp_path):
    gpu.main(["--profile", "--dry-run"])
    assert capsys.readouterr().out == "dry run: profile\n"
    gpu.main([str(tmp_path), "--name", "a-1", "--calls", "ours", "--seconds", "55", "--dry-run"])
    assert capsys.readouterr().out.startswith("dry run: ['ours'] of ['logprobs', 'kl', ")
    for arguments, message in (([], "OUTDIR is missing"), (["x", "--only", "none"], "invalid choice: 'none'")):
        with pytest.raises(SystemExit):
            gpu.main(arguments)
        assert message in capsys.readouterr().err
