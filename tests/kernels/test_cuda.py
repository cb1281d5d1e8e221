"""The CUDA backend without a GPU: what the compiler made of it, and that the module says why it cannot run.

The ops' own tests run its kernels' blocks as fibers on the CPU (tests/cuda_on_cpu).
"""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rlhf_kernels import _native, dispatch

PACKAGE = Path(_native.__file__).parent
ROOT = Path(__file__).resolve().parents[2]
OPS = [op for op, rows in dispatch.TABLE.items() if "cuda" in [name for name, _ in rows]]


def built() -> Path:
    modules = sorted(PACKAGE.glob("_cuda*.so"))
    if not modules:
        note = PACKAGE / "_cuda_build_error.txt"
        pytest.skip(note.read_text().strip() if note.exists() else "rlhf_kernels._cuda was not built")
    return modules[0]


def cuobjdump() -> str:
    beside_triton = find_spec("triton")
    if beside_triton is not None:
        tool = Path(beside_triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.exists():
            return str(tool)
    return shutil.which("cuobjdump") or pytest.skip("needs cuobjdump, which lies beside triton or nvcc")


def test_no_kernel_spills():
    """Local memory of every kernel, for every architecture it is built for; what spills lies on the stack.

    8 bytes of it are no spill: they save a register over the slow path of a double's division or root.
    """
    listing = subprocess.run(
        [cuobjdump(), "-res-usage", str(built())], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", listing)
    assert len({name for name, *_ in found}) >= 2 * len(OPS)
    assert [row for row in found if int(row[2]) > 8 or int(row[4])] == []


def test_every_architecture_is_built():
    module = built()
    listing = subprocess.run([cuobjdump(), "-lelf", str(module)], capture_output=True, text=True, check=True).stdout
    text = re.search(
        r'CUDA_ARCHS = os.environ.get\("RLHF_KERNELS_CUDA_ARCHS", "([^"]+)"\)', (ROOT / "setup.py").read_text()
    )
    for arch in text[1].split():
        assert f"sm_{arch}." in listing, f"{module.name} lacks sm_{arch}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_module_loads_without_a_driver_and_says_that_there_is_no_gpu(monkeypatch):
    built()
    monkeypatch.delenv(_native.CUDA_ON_CPU, raising=False)
    _native._load_cuda.cache_clear()
    try:
        assert _native.missing_cuda() == "there is no NVIDIA GPU"
        with (
            dispatch.backend("cuda"),
            pytest.raises(RuntimeError, match="cannot serve advantages: there is no NVIDIA GPU"),
        ):
            dispatch.pick("advantages", torch.zeros(2, 3))
    finally:
        _native._load_cuda.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_launchers_count_and_convert_their_arguments():
    if _native.missing_cuda():
        pytest.skip(_native.missing_cuda())
    with pytest.raises(TypeError, match="approx_kl_fwd takes 10 arguments, got 1"):
        _native.launch("approx_kl_fwd", torch.zeros(1))
    names = {name.partition("_")[0] for name in _native._launchers()}
    assert names >= {"gae", "policy", "ppo", "bradley", "approx", "logprobs"}


@pytest.mark.skipif(_native.missing_cuda() is not None, reason=f"no CUDA launchers: {_native.missing_cuda()}")
@pytest.mark.parametrize("layout", ("padded", "packed", "alone"))
def test_rows_have_the_same_bits_however_they_are_shared_among_blocks(layout, monkeypatch):
    """One block walks a row, or each tile has a block that waits for the tiles behind it."""
    from rlhf_kernels.cuda import advantages

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    B, T = 3, 2500
    mask = torch.rand(B, T, generator=generator) < 0.9
    mask[0, 1200:2300] = False
    mask[1, -50:] = False
    mask[2] = False
    mask[2, 7] = True
    tokens = [torch.randn(B, T, generator=generator).masked_fill(~mask, torch.nan).to(device) for _ in range(4)]
    scores, last, mask = torch.randn(B, generator=generator).to(device), torch.ones(B, device=device), mask.to(device)
    offsets = None
    if layout == "packed":
        offsets = torch.arange(0, B * T + 1, T, device=device)
        tokens, mask = [x.reshape(-1) for x in tokens], mask.reshape(-1)
    if layout == "alone":
        tokens, mask, scores, last = [x[:1] for x in tokens], mask[:1], scores[:1], last[:1]
    rewards, values, log_probs, ref = tokens
    found = []
    for few_rows, long_row in ((0, 0), (1 << 30, 100)):
        monkeypatch.setattr(advantages, "FEW_ROWS", few_rows)
        monkeypatch.setattr(advantages, "LONG_ROW", long_row)
        gae = advantages.gae_fwd(rewards, values, mask, 0.99, 0.95, offsets, last)
        options = (mask, 0.1, 1.0, 0.95, "k3", 1.5, False, offsets)
        found.append((*gae, *advantages.rlhf_advantages_fwd(scores, log_probs, ref, values, *options)))
    for walked, shared in zip(*found):
        assert torch.equal(walked, shared) and walked.isfinite().all()
