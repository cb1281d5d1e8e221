"""The CUDA backend without a GPU: what the compiler made of it, and that the module says why it cannot run.

The ops' own tests run its kernels' blocks as fibers on the CPU (tests/cuda_on_cpu).
"""

import itertools
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rlhf_kernels as rk
from benchmarks import compile_cuda
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


@pytest.fixture
def module(monkeypatch):
    """The module itself, not the one for the CPU."""
    built()
    monkeypatch.delenv(_native.CUDA_ON_CPU, raising=False)
    _native._load_cuda.cache_clear()
    yield _native._load_cuda()[0]
    _native._load_cuda.cache_clear()


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


def listed(option: str) -> str:
    return subprocess.run([cuobjdump(), option, str(built())], capture_output=True, text=True, check=True).stdout


def test_every_architecture_that_the_module_names_is_in_it(module):
    held = set(re.findall(r"\.sm_(\d+[af]?)\.cubin", listed("-lelf")))
    assert held == set(module.architectures.split())
    assert set(re.findall(r"\.sm_(\d+)\.ptx", listed("-lptx"))) == {str(module.ptx)}


# kernel: most instructions an entry (of KL: a pair), of sm_90; the loop reads 16 bytes at a time and has no barrier
BOUNDS = {
    "statistics_kernel<1, true, bf16>": 12.5,  # log-probs and entropy
    "statistics_kernel<1, false, bf16>": 10.0,
    "gradient_kernel<0, bf16>": 12.0,
    "gradient_kernel<1, bf16>": 14.0,
    "kl_fwd_kernel<bf16, bf16>": 24.0,
    "kl_bwd_kernel<bf16, bf16>": 26.0,
}


def test_instructions_an_entry_barriers_and_loads():
    """By count: what a change of the kernels would cost on a GPU shows without one."""
    if shutil.which("c++filt") is None:
        pytest.skip("needs c++filt to read the kernels' names")
    cuobjdump()
    found = {row.kernel: row for row in compile_cuda.report(built())}
    if not found:
        pytest.skip("the module was not built for sm_90")
    for kernel, most in BOUNDS.items():
        row = found[kernel]
        assert row.per_entry <= most and row.barriers == 0 and row.widest_load == 16 and row.spilled == 0, row
    walks = {name: row for name, row in found.items() if name.startswith("walk_kernel")}
    assert walks and all(row.widest_load == 16 and row.registers <= 128 for row in walks.values())
    ppo = walks["walk_kernel<Walk<ClipObjective, false, true, false, false> >"]
    assert ppo.per_entry <= 190, ppo  # a token, with values


# name, compute capability -> served by a build for 80 90a 100, by one of an nvcc without compute_100, by 90a alone
GPUS = {
    "V100": ((7, 0), False, False, False),
    "T4": ((7, 5), False, False, False),
    "A100": ((8, 0), True, True, False),
    "A10, RTX 3090": ((8, 6), True, True, False),
    "RTX 4090, L4, L40S": ((8, 9), True, True, False),
    "H100, H200": ((9, 0), True, True, True),
    "B200": ((10, 0), True, True, True),
    "B300": ((10, 3), True, True, True),
    "RTX 5090": ((12, 0), True, True, True),
}
BUILDS = ("80 90a 100", 100), ("80 90a", 90), ("90a", 90)


@pytest.mark.parametrize("gpu", GPUS)
def test_which_gpus_a_build_serves(gpu):
    capability, *expected = GPUS[gpu]
    assert [_native.serves(capability, *build) for build in BUILDS] == expected


def test_code_without_ptx_serves_its_own_major_version():
    assert [_native.serves((10, minor), "100", 0) for minor in (0, 3)] == [True, True]
    assert [_native.serves((9, minor), "90a", 0) for minor in (0, 1)] == [True, False]
    assert not _native.serves((8, 0), "86", 0)
    assert not _native.serves((12, 0), "80 90a 100", 0)


HELD = "_cuda was built for sm_80, sm_90a, sm_100 and PTX of compute_100"


@pytest.mark.parametrize(
    "capabilities, driver, reason",
    [
        ([(9, 0)], 13000, None),
        ([(9, 0)], 13020, None),
        ([(8, 0), (12, 0)], 13000, None),
        ([(8, 0), (7, 5)], 13000, f"GPU 1, T, has compute capability 7.5; {HELD}: RLHF_KERNELS_CUDA_ARCHS builds"),
        ([(9, 0)], 12040, f"the driver serves CUDA up to 12.4; {HELD}, and needs 13.0 or newer"),
        ([(9, 0)], 0, "the driver serves CUDA up to 0.0"),
    ],
)
def test_what_is_missing_is_named(capabilities, driver, reason):
    module = SimpleNamespace(architectures="80 90a 100", ptx=100, runtime=13000)
    found = _native.unserved([("T", x) for x in capabilities], module, driver)
    assert found is None if reason is None else found.startswith(reason)


def test_a_driver_must_know_the_ptx_that_it_compiles_and_no_more():
    """Code of CUDA 13.1 runs under a driver for 13.0; PTX of 13.1 does not."""
    module = SimpleNamespace(architectures="80 90a 100", ptx=100, runtime=13010)
    assert _native.unserved([("H200", (9, 0))], module, 13000) is None
    assert _native.unserved([("RTX 5090", (12, 0))], module, 13000).endswith("needs 13.1 or newer")


def test_the_module_says_what_it_was_built_for(module):
    assert re.fullmatch(r"\d+[af]?( \d+[af]?)*", module.architectures)
    assert str(module.ptx) == max((x.rstrip("af") for x in module.architectures.split()), key=int)
    assert 11000 <= module.runtime < 20000
    assert module.driver() >= 0


@pytest.mark.parametrize("device, guarded", [("cuda:0", False), ("cuda:1", True)])
def test_another_device_is_made_current_only_where_it_is_not(device, guarded, monkeypatch):
    log, here = [], torch.device(device)

    class Guard:
        def __init__(self, device):
            log.append(("guard", device))

        def __enter__(self):
            log.append("enter")

        def __exit__(self, *_):
            log.append("exit")

    fake = SimpleNamespace(device=here, data_ptr=lambda: 7)
    monkeypatch.setattr(_native, "Tensor", SimpleNamespace)
    monkeypatch.setattr(_native, "signatures", lambda _: {"f": SimpleNamespace(check=lambda *_: None)})
    monkeypatch.setattr(_native, "_launchers", lambda: {"f": lambda *args: log.append(args)})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=9))
    monkeypatch.setattr(torch.cuda, "device", Guard)
    _native.launch("f", fake, 3)
    call = (here.index, 7, 3, 9)
    assert log == ([("guard", here), "enter", call, "exit"] if guarded else [call])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(_native.missing_cuda() is not None, reason=f"no CUDA launchers: {_native.missing_cuda()}")
def test_more_blocks_than_a_grid_has_are_refused():
    launcher, address = _native._launchers()["approx_kl_fwd"], torch.zeros(1).data_ptr()
    with pytest.raises(ValueError, match="the tensors take 2147483648 blocks of a GPU, which has at most 2147483647"):
        launcher(0, address, 0, 0, address, 0, 0, 1, 256 << 31, 1, address, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_module_loads_without_a_driver_and_says_that_there_is_no_gpu(module):
    assert _native.missing_cuda() == "there is no NVIDIA GPU"
    with (
        dispatch.backend("cuda"),
        pytest.raises(RuntimeError, match="cannot serve advantages: there is no NVIDIA GPU"),
    ):
        dispatch.pick("advantages", torch.zeros(2, 3))


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


def large(generator) -> dict:
    """{what is called: its results}, at sizes that take several warps and blocks."""

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    logits, ref = (randn(3, 9001).bfloat16().requires_grad_() for _ in range(2))
    labels = torch.tensor([5, 9000, -100])
    log_probs, entropy = rk.logprobs_and_entropy_from_logits(logits, labels)
    found = {"logprobs": [log_probs, entropy, *torch.autograd.grad(log_probs.sum() + entropy.sum(), logits)]}
    found["statistics"] = list(rk.token_statistics_from_logits(logits.detach(), labels))
    kl = rk.kl_from_logits(logits, ref)
    found["kl"] = [kl, *torch.autograd.grad(kl.sum(), (logits, ref))]
    tokens, mask = [randn(3, 1500) for _ in range(6)], torch.rand(3, 1500, generator=generator) < 0.9
    found["gae"] = list(rk.gae(*tokens[:2], mask))
    found["shaped"] = list(rk.rlhf_advantages(tokens[0][:, 0], *tokens[1:4], mask, kl_coef=0.1, whiten=True))
    found["whiten"] = [rk.masked_whiten(tokens[0], mask)]
    new = tokens[0].clone().requires_grad_()
    for mode in ("token-mean", "seq-mean-token-mean"):
        for name, objective in (("clip", rk.Clip()), ("gspo", rk.GSPO())):
            loss = rk.policy_loss(new, *tokens[1:3], mask, objective=objective, loss_agg_mode=mode)
            found[f"policy {name} {mode}"] = [*torch.autograd.grad(loss.loss, new), loss.loss, *loss.metrics.values()]
        values = dict(zip(("values", "old_values", "returns"), tokens[3:]))
        loss = rk.ppo_loss(new, *tokens[1:3], mask, **values, loss_agg_mode=mode)
        found[f"ppo {mode}"] = [*torch.autograd.grad(loss.loss, new), *loss[:3], *loss.metrics.values()]
    sizes = (9, 40, 3, 150)
    scores, offsets = randn(sum(sizes)).requires_grad_(), torch.tensor((0, *sizes)).cumsum(0)
    ranks = torch.randint(-1, 30, (sum(sizes),), generator=generator)
    for name, losses in (("pairs", rk.bradley_terry_loss), ("orders", rk.plackett_luce_loss)):
        loss, metrics = losses(scores, ranks, offsets)
        found[name] = [loss, *torch.autograd.grad(loss, scores), *metrics.values()]
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(_native.missing_cuda() is not None, reason=f"no CUDA launchers: {_native.missing_cuda()}")
def test_no_bit_depends_on_the_order_of_threads_and_blocks(monkeypatch):
    """What needs a barrier that is not there gives other results in another order."""
    found = {}
    for order in ("down", "up", "random"):
        monkeypatch.setenv("RLHF_KERNELS_FIBERS", order)
        with dispatch.backend("cuda"):
            found[order] = large(torch.Generator().manual_seed(0))
    for order in ("up", "random"):
        for name, expected in found["down"].items():
            for x, y in zip(found[order][name], expected, strict=True):
                assert torch.equal(x, y) and x.isfinite().all(), f"{name} {order}"


GUARD = 4096  # entries on both sides that nobody may touch


def guarded(tensor):
    """The tensor between entries that hold another number, and a check that they still do."""
    around = torch.full((tensor.numel() + 2 * GUARD,), 77, dtype=tensor.dtype)
    inside = around[GUARD:-GUARD].view(tensor.shape)
    inside.copy_(tensor)
    return inside, lambda: bool((around[:GUARD] == 77).all() and (around[-GUARD:] == 77).all())


BAD_OFFSETS = {
    "beyond the end": ([0, 3000, 1 << 40], [1]),
    "before the start": ([0, -3000, 6000], [0, 1]),
    "descending": ([0, 5000, 3000, 6000], [1]),
    "none of them": ([1 << 40, 1 << 41, -1], [0, 1]),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(_native.missing_cuda() is not None, reason=f"no CUDA launchers: {_native.missing_cuda()}")
@pytest.mark.parametrize("units", (False, True))
@pytest.mark.parametrize("case", BAD_OFFSETS)
def test_wrong_offsets_of_rows_stay_within_the_memory(case, units, monkeypatch):
    """A GPU's offsets are read by nobody before the kernels: a row with wrong ones is NaN, nothing else is touched."""
    from rlhf_kernels.cuda import advantages

    offsets, bad = BAD_OFFSETS[case]
    monkeypatch.setattr(advantages, "FEW_ROWS", 256 if units else 0)
    checks, results = [], []

    def fresh(like, count):
        made = [guarded(torch.full(like.shape, 55.0)) for _ in range(count)]
        checks.extend(check for _, check in made)
        results.extend(x for x, _ in made)
        return [x for x, _ in made]

    monkeypatch.setattr(advantages, "_fresh", fresh)
    rewards, values = torch.randn(6000), torch.randn(6000)
    cu = torch.tensor(offsets)
    advantages.gae_fwd(rewards, values, None, 0.99, 0.95, cu, None)
    scores = torch.zeros(len(offsets) - 1)
    advantages.rlhf_advantages_fwd(scores, rewards, values, values, None, 0.1, 1.0, 0.95, "k1", None, False, cu)
    assert all(check() for check in checks)
    for b, (begin, end) in enumerate(itertools.pairwise(offsets)):
        begin, end = (min(max(x, 0), 6000) for x in (begin, end))
        if b in bad and case != "descending":  # where other rows lie over it
            for x in results[:4]:  # advantages and returns
                assert x[begin:end].isnan().all()
    if case == "beyond the end":
        assert all(x[:3000].isfinite().all() for x in results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(_native.missing_cuda() is not None, reason=f"no CUDA launchers: {_native.missing_cuda()}")
@pytest.mark.parametrize("case", BAD_OFFSETS)
def test_wrong_offsets_of_prompts_stay_within_the_memory(case, monkeypatch):
    from rlhf_kernels.cuda import bradley_terry

    offsets, bad = BAD_OFFSETS[case]
    offsets = [x if abs(x) > 1 << 30 or x == -1 else x // 100 for x in offsets]
    cu, checks = torch.tensor(offsets), []
    plain, plain_like = torch.empty, torch.empty_like

    def around(made):
        x, check = guarded(made.fill_(55))
        checks.append(check)
        return x

    monkeypatch.setattr(torch, "empty", lambda *args, **options: around(plain(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda x: around(plain_like(x)))
    scores, ranks = torch.randn(60), torch.arange(60)
    for forward in (
        lambda: bradley_terry.bradley_terry_fwd(scores, ranks, cu, None, False),
        lambda: bradley_terry.plackett_luce_fwd(scores, ranks, cu),
    ):
        loss, grad, stats = forward()
        out = bradley_terry.bradley_terry_bwd(torch.ones(len(offsets) - 1), grad, cu)
        wrong = torch.zeros(len(offsets) - 1, dtype=torch.bool)
        wrong[bad] = True
        assert torch.equal(loss.isnan(), wrong) and torch.equal(stats.isnan().any(1), wrong)
        if case == "beyond the end":
            assert out[30:].isnan().all() and out[:30].isfinite().all()
    value, grad, metrics = bradley_terry.ranking_fwd(scores, ranks, cu, 0, len(offsets) - 1, None, "pairs", 0.0, None)
    out = bradley_terry.ranking_bwd(torch.ones(()), grad, metrics[6])
    assert value.isnan() and out.isnan().all() and metrics.isnan().all()
    assert checks and all(check() for check in checks)


@pytest.mark.skipif(_native.missing_cuda() is not None, reason=f"no CUDA launchers: {_native.missing_cuda()}")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("vocab", (4096, 12345, 33000, 70001))
def test_rows_of_several_turns_and_parts(vocab, dtype, assert_close_to_fp64):
    """Whole turns are read ahead, the rest is not; and a row has the same bits where its words straddle."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(vocab)
    around = torch.full((2, vocab + 8), torch.nan, dtype=dtype)
    around[:, 8:] = (4 * torch.randn(2, vocab, generator=generator)).to(dtype)
    around[0, torch.randint(8, vocab + 8, (vocab // 3,), generator=generator)] = -torch.inf
    around[1, 8 + vocab // 2] = 30.0  # nearly certain
    ref = (4 * torch.randn(2, vocab, generator=generator)).to(dtype)
    labels = torch.tensor([int(around[0, 8:].argmax()), vocab // 2])
    found = []
    for shift in (0, 1):
        logits = torch.empty(2, vocab + shift, dtype=dtype).to(device)[:, shift:]
        logits.copy_(around[:, 8:])
        logits.requires_grad_()
        with dispatch.backend("cuda"):
            log_probs, entropy = rk.logprobs_and_entropy_from_logits(logits, labels.to(device), temperature=0.8)
            kl = rk.kl_from_logits(logits, ref.to(device), temperature=0.8)
        (gradient,) = torch.autograd.grad(log_probs.sum() + 0.1 * entropy.sum() + kl.sum(), logits)
        found.append([x.detach().cpu() for x in (log_probs, entropy, kl, gradient)])
    assert all(torch.equal(x, y) for x, y in zip(*(x[:3] for x in found)))
    exact = around[:, 8:].double().requires_grad_()
    log_p, log_q = ((x.double() / 0.8).log_softmax(-1) for x in (exact, ref))
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p.clamp(min=-1e6))
    divergence = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p.clamp(min=-1e6) - log_q)).sum(-1)
    expected = log_p.gather(1, labels[:, None])[:, 0], -terms.sum(-1), divergence
    (slope,) = torch.autograd.grad(expected[0].sum() + 0.1 * expected[1].sum() + divergence.sum(), exact)
    for x, y in zip(found[0][:3], expected):
        assert_close_to_fp64(x, y.detach(), torch.float32)
    for got in found:
        assert_close_to_fp64(got[3], torch.where(around[:, 8:] == -torch.inf, 0.0, slope), dtype)
