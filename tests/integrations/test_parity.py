"""The comparison with a peer that is installed: its errors, its table, its exit status."""

import math
import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rlhf_kernels import parity


def comparison(ours, theirs, *, name="square"):
    leaf = torch.linspace(-2.0, 3.0, 64)
    return parity.Comparison(name, ours, theirs, lambda x: (x.square(),), (leaf,))


def square(x):
    return (x * x,)


def rounded(x):
    return ((x * x).bfloat16().float(),)


def test_errors_are_measured_against_float64():
    sides = parity.measured(comparison(square, rounded), 1)
    assert sides["ours"].value < 1e-7 < 1e-3 < sides["theirs"].value
    assert parity.within(sides["ours"], torch.float32) and not parity.within(sides["theirs"], torch.float32)
    assert sides["ours"].seconds > 0
    assert parity.measured(comparison(lambda x: (x * x + 0.0 * x.detach(),), square), 1)["ours"].gradient < 1e-6
    half = parity.measured(comparison(lambda x: (x.square() * 0.5 + (x.square() * 0.5).detach(),), square), 1)["ours"]
    assert half.value < 1e-7 and half.gradient == pytest.approx(0.5)


def test_nan_and_misplaced_infinities_are_errors():
    exact = [torch.tensor([1.0, -math.inf], dtype=torch.float64)]
    assert parity.value_error([torch.tensor([1.0, -math.inf])], exact) == 0.0
    assert parity.value_error([torch.tensor([1.0, math.nan])], exact) == math.inf
    assert parity.value_error([torch.tensor([-math.inf, -math.inf])], exact) == math.inf
    assert parity.gradient_error([torch.tensor([math.nan])], [torch.ones(1, dtype=torch.float64)]) == math.inf


@pytest.mark.parametrize(("ours", "status"), ((square, 0), (rounded, 1)), ids=("inside", "outside"))
def test_the_table_and_the_status(ours, status, monkeypatch, capsys):
    peer = types.ModuleType("rlhf_kernels.integrations._parity_trl")
    peer.NAME, peer.check = "Peer", lambda: None
    peer.comparisons = lambda shape, dtype, device: [comparison(ours, square), comparison(square, square, name="other")]
    monkeypatch.setitem(sys.modules, peer.__name__, peer)
    assert parity.main(["trl", "--shape", "4x5x6", "--repeats", "1"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Peer: 4 rows, 5 tokens, width 6, fp32 on " + ("cuda" if torch.cuda.is_available() else "cpu")
    assert [line.split()[0] for line in lines[-2:]] == ["square", "other"]
    assert lines[-2].endswith("OUTSIDE") == bool(status) and not lines[-1].endswith("OUTSIDE")


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["trl", "--shape", "4x5"], "expected ROWSxVOCABxHIDDEN"),
        (["trl", "--shape", "4x5x0"], "a number below 1"),
        (["trl", "--repeats", "0"], "--repeats is 0, expected 1 or more"),
        (["axolotl"], "invalid choice"),
    ),
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parity.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("peer", parity.PEERS)
def test_an_absent_peer_is_named(peer, capsys):
    if find_spec(peer) is not None:
        pytest.skip(f"the package {peer} is installed")
    with pytest.raises(SystemExit):
        parity.main([peer])
    assert peer in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize(
    ("peer", "row"), (("trl", "fused head, 5"), ("openrlhf", "PolicyLoss"), ("verl", "compute_gae"))
)
def test_the_peers_that_are_installed(peer, row, dtype):
    if find_spec(peer) is None:
        pytest.skip(f"the package {peer} is not installed: make test-integrations-{peer}")
    stubs = str(Path(__file__).parent / "stubs") if peer == "openrlhf" else ""
    path = os.pathsep.join(x for x in (os.environ.get("PYTHONPATH"), stubs) if x)
    command = [sys.executable, "-m", "rlhf_kernels.parity", peer, "--shape", "24x500x32", "--dtype", dtype]
    env = {**os.environ, "PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert row in done.stdout and "OUTSIDE" not in done.stdout
