"""GAE, KL-shaped rewards and whitening, on every backend and every instruction set."""

import os
import statistics
import subprocess
import sys
import textwrap

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import gae, masked_whiten, rlhf_advantages
from rlhf_kernels.reference import advantages as reference

GAE_INPUTS = ("rewards", "values", "mask", "cu_seqlens", "last_values")
RLHF_INPUTS = ("scores", "log_probs", "ref_log_probs", "values", "mask", "cu_seqlens")
RLHF_OPTIONS = {"kl_coef": 0.1, "gamma": 0.99, "lam": 0.95}


def doubled(inputs):
    return {k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in inputs.items()}


def run_gae(inputs, **options):
    rewards, values, mask, cu_seqlens, last_values = (inputs[name] for name in GAE_INPUTS)
    return gae(rewards, values, mask, cu_seqlens=cu_seqlens, last_values=last_values, **options)


def run_rlhf(inputs, **options):
    scores, log_probs, ref, values, mask, cu_seqlens = (inputs[name] for name in RLHF_INPUTS)
    return rlhf_advantages(scores, log_probs, ref, values, mask, cu_seqlens=cu_seqlens, **{**RLHF_OPTIONS, **options})


def expected_gae(inputs, gamma, lam):
    rewards, values, mask, cu_seqlens, last_values = (doubled(inputs)[name] for name in GAE_INPUTS)
    return reference.gae_fwd(rewards, values, mask, gamma, lam, cu_seqlens, last_values)


def brute_force_gae(rewards, values, mask, gamma, lam, last_value=0.0):
    """A_t as the double sum of the definition over the kept tokens of one row, in Python floats."""
    kept = [t for t in range(len(mask)) if mask[t]]
    r, v = [float(rewards[t]) for t in kept], [float(values[t]) for t in kept] + [float(last_value)]
    deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(kept))]
    out = [0.0] * len(mask)
    for i, t in enumerate(kept):
        out[t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(kept)))
    return torch.tensor(out, dtype=torch.float64)


# 1. values: against the float64 definition


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", reference.CASES)
def test_values(backend_name, case, dtype, assert_close_to_fp64):
    inputs = reference.example_inputs(case, dtype=dtype)
    for actual, expected in zip(run_gae(inputs, gamma=0.99, lam=0.95), expected_gae(inputs, 0.99, 0.95)):
        assert actual.dtype == torch.float32
        assert_close_to_fp64(actual, expected, torch.float32, scale=2)
    for estimator in ("k1", "k2", "k3"):
        options = {"kl_estimator": estimator, "reward_clip": 0.5}
        actual = run_rlhf(inputs, **options)
        with rlhf_kernels.backend("reference"):
            expected = run_rlhf(doubled(inputs), **options)
        for a, e in zip(actual, expected):
            assert_close_to_fp64(a, e, torch.float32, scale=2)


@pytest.mark.parametrize("case", reference.CASES)
def test_values_isa(isa, case, assert_close_to_fp64):
    inputs = reference.example_inputs(case, dtype=torch.float32, seed=1)
    for actual, expected in zip(run_gae(inputs, gamma=1.0, lam=0.9), expected_gae(inputs, 1.0, 0.9)):
        assert_close_to_fp64(actual, expected, torch.float32, scale=2)
    actual = run_rlhf(inputs, kl_estimator="k3")
    with rlhf_kernels.backend("reference"):
        expected = run_rlhf(doubled(inputs), kl_estimator="k3")
    for a, e in zip(actual, expected):
        assert_close_to_fp64(a, e, torch.float32, scale=2)


def recursion(rewards, values, mask, last_value, gamma, lam):
    """One row in plain Python floats."""
    advantage, next_value, out = 0.0, float(last_value), [0.0] * len(mask)
    r, v, keep = rewards.tolist(), values.tolist(), mask.tolist()
    for t in reversed(range(len(mask))):
        if keep[t]:
            advantage = r[t] + gamma * next_value - v[t] + gamma * lam * advantage
            next_value, out[t] = v[t], advantage
    return torch.tensor(out, dtype=torch.float64)


def on_threads(counts, call):
    """The results of call() on each number of threads, which have the same bits."""
    before, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    return results[0]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("lam", [0.95, 1.0])
def test_values_of_a_row_split_among_threads(isa, lam, packed, assert_close_to_fp64):
    """A row of several segments, of which gaps hide some. The error grows as sqrt(T) at most; for lam < 1 not."""
    generator = torch.Generator().manual_seed(1)
    lengths = [70_001, 300, 5, 20_000] if packed else [70_001]
    cu = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    mask = torch.rand(sum(lengths), generator=generator) < 0.9
    mask[10_000:40_000] = mask[69_900:70_001] = False
    shape = (-1,) if packed else (1, -1)
    rewards, values, log_probs = (
        torch.randn(len(mask), generator=generator).masked_fill(~mask, torch.nan).view(shape) for _ in range(3)
    )
    last, scores = torch.randn(2, len(lengths), generator=generator).unbind()
    mask = mask.view(shape)
    advantages, *_, white = on_threads(
        (1, 2, 3),
        lambda: (
            *gae(rewards, values, mask, gamma=1.0, lam=lam, cu_seqlens=cu, last_values=last),
            *rlhf_advantages(scores, log_probs, log_probs * 0.9, values, mask, kl_coef=0.1, cu_seqlens=cu),
            masked_whiten(values, mask),
        ),
    )
    rows = zip(*(x.flatten().split(lengths) for x in (rewards, values, mask)), last)
    expected = torch.cat([recursion(*row, 1.0, lam) for row in rows]).view(shape)
    assert_close_to_fp64(advantages, expected, torch.float32, scale=1 if lam < 1 else 70_001**0.5 / 16)
    exact = values[mask].double()
    assert_close_to_fp64(white[mask], (exact - exact.mean()) / exact.std(), torch.float32)


def test_values_larger_than_the_caches(isa):
    """Results that go past the caches have the bits of those that do not, wherever a row begins and ends."""
    generator = torch.Generator().manual_seed(2)

    def everything(scores, log_probs, ref, values, mask):
        options = {"kl_coef": 0.1, "whiten": False}
        return *gae(ref, values, mask), *rlhf_advantages(scores, log_probs, ref, values, mask, **options)

    for T in (2048, 2051):
        B = 17 * 2**20 // 8 // T
        mask = torch.arange(T) < torch.randint(T // 2, T + 1, (B, 1), generator=generator)
        mask[::5] = True
        inputs = [torch.randn(B, generator=generator), *torch.randn(3, B, T, generator=generator), mask]
        large = everything(*inputs)
        assert all((x[~mask] == 0).all() for x in large)
        for b in (0, 1, 7, B - 1):
            small = everything(*(x[b : b + 1] for x in inputs))
            assert all(torch.equal(a[0], x[b]) for a, x in zip(small, large))


@pytest.mark.parametrize("T", [1, 2, 7, 15, 16, 17, 31, 33, 100])
def test_values_every_pattern_of_gaps(isa, T, assert_close_to_fp64):
    """Rows that fill blocks exactly, by one too few and by one too many, under masks from empty to full."""
    generator = torch.Generator().manual_seed(T)
    mask = torch.rand(200, T, generator=generator) < torch.linspace(0, 1, 200)[:, None]
    rewards, values = torch.randn(2, 200, T, generator=generator).unbind()
    rewards, values = rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.inf)
    last = torch.randn(200, generator=generator)
    advantages, returns = gae(rewards, values, mask, gamma=0.99, lam=0.9, last_values=last)
    expected = torch.stack([recursion(*row, 0.99, 0.9) for row in zip(rewards, values, mask, last)])
    assert_close_to_fp64(advantages, expected, torch.float32, scale=2)
    assert_close_to_fp64(returns, torch.where(mask, expected + values.double(), 0.0), torch.float32, scale=2)


@pytest.mark.parametrize("mean,spread", [(1e6, 1.0), (0.0, 1e-6), (-3e4, 1e-2)])
def test_values_whitening_far_from_zero(isa, mean, spread):
    """The statistics and the whitened values do not suffer from a mean that is large beside the deviation."""
    generator = torch.Generator().manual_seed(3)
    values = mean + spread * torch.randn(3, 20_011, generator=generator)
    mask = torch.rand(values.shape, generator=generator) < 0.8
    exact = values[mask].double()
    stats = torch.ops.rlhf_kernels.whiten_stats_fwd(values.masked_fill(~mask, torch.nan), mask)
    wanted = torch.stack((torch.tensor(float(len(exact))), exact.mean(), exact.var(correction=0) * len(exact)))
    torch.testing.assert_close(stats, wanted, rtol=1e-9, atol=0)
    white = (exact - exact.mean()) / (exact.var() + 1e-8).sqrt()
    torch.testing.assert_close(masked_whiten(values, mask)[mask].double(), white, rtol=1e-6, atol=1e-7)


def test_values_k3_range(isa):
    """k3 over the whole range of fp32's exp: relative error at most 4 ulp, never negative."""
    gap = torch.cat([torch.linspace(-88, 88, 4001), torch.logspace(-6, 0, 500), -torch.logspace(-6, 0, 500)])[None]
    zeros = torch.zeros_like(gap)
    kl = rlhf_advantages(torch.zeros(1), gap, zeros, zeros, None, kl_coef=1.0, kl_estimator="k3", whiten=False).kl
    exact = torch.expm1(-gap.double()) + gap.double()
    small = gap.double().abs() < 1e-3
    exact = torch.where(small, gap.double().square() * (0.5 - gap.double() / 6 + gap.double().square() / 24), exact)
    assert (kl >= 0).all()
    error = (kl.double() - exact).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * exact).all(), (error / exact.clamp(min=1e-30)).max()


# 2. reference: hand-worked numbers, and an independent implementation


def test_reference_worked_numbers(backend_name):
    policy = torch.tensor([[-0.15, -0.30, -0.05, -0.10, -0.08, -0.20, -0.03]])
    sft = torch.tensor([[-0.20, -0.45, -0.06, -0.12, -0.10, -0.80, -0.04]])
    zeros = torch.zeros(1, 7)
    out = rlhf_advantages(torch.tensor([2.1]), policy, sft, zeros, None, kl_coef=0.02, lam=1.0, whiten=False)
    assert round(out.kl.sum().item(), 2) == 0.86
    assert round(2.1 - out.rewards.sum().item(), 4) == 0.0172
    assert round(out.advantages[0, 0].item() - 0.1 * 3.2, 3) == 1.763
    advantage, returns = gae(torch.tensor([[1.85]]), torch.tensor([[1.20]]))
    assert round(advantage.item(), 2) == 0.65
    assert round(returns.item(), 2) == 1.85


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0), (0.0, 0.7)])
def test_trap_08_gae_reads_no_masked_value(backend_name, gamma, lam, assert_close_to_fp64):
    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 24, 41, generator=generator).unbind()
    mask = torch.rand(24, 41, generator=generator) < torch.linspace(0, 1, 24)[:, None]
    last = torch.randn(24, generator=generator)
    rewards, values = rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.inf)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, last_values=last)
    rows = [brute_force_gae(*row[:3], gamma, lam, row[3]) for row in zip(rewards, values, mask, last)]
    expected = torch.stack(rows)
    assert_close_to_fp64(advantages, expected, torch.float32, scale=4)
    assert_close_to_fp64(returns, torch.where(mask, expected + values.double(), 0.0), torch.float32, scale=4)
    assert (advantages[~mask] == 0).all()


def test_trap_08_lambda_one_is_monte_carlo_and_zero_is_one_step(backend_name):
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, -1.0, 3.0]])
    advantages, returns = gae(rewards, values, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, torch.tensor([[6.5, 7.0, 1.0]]))
    torch.testing.assert_close(returns, torch.tensor([[7.0, 6.0, 4.0]]))
    advantages, _ = gae(rewards, values, gamma=1.0, lam=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[-0.5, 6.0, 1.0]]))
    cut_off, _ = gae(rewards, values, gamma=0.5, lam=0.0, last_values=torch.tensor([10.0]))
    torch.testing.assert_close(cut_off[0, -1], torch.tensor(4.0 + 5.0 - 3.0))


def padded_loop(rewards, values, mask, gamma, lam):
    """One row where a masked token is one of reward and value 0, in plain Python floats."""
    T, keep = len(mask), mask.tolist()
    r = [float(x) if k else 0.0 for x, k in zip(rewards, keep)]
    v = [float(x) if k else 0.0 for x, k in zip(values, keep)] + [0.0]
    deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(T)]
    out = [sum((gamma * lam) ** (j - t) * deltas[j] for j in range(t, T)) * keep[t] for t in range(T)]
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_reference_masked_tokens_of_reward_and_value_zero(backend_name, packed, assert_close_to_fp64):
    """masked="zero" against the double sum of the definition; against "skip" where no masked token stands between."""
    generator = torch.Generator().manual_seed(4)
    rewards, values = torch.randn(2, 12, 23, generator=generator).unbind()
    mask = torch.rand(12, 23, generator=generator) < torch.linspace(0, 1, 12)[:, None]
    expected = torch.stack([padded_loop(*row, 0.9, 0.8) for row in zip(rewards, values, mask)])
    wanted = expected, torch.where(mask, expected + values.double(), 0.0)
    rewards, values = rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.inf)
    cu = torch.arange(0, 277, 23) if packed else None
    shape = (-1,) if packed else (12, 23)
    inputs = [x.reshape(shape) for x in (rewards, values, mask)]
    found = gae(*inputs, gamma=0.9, lam=0.8, masked="zero", cu_seqlens=cu)
    for x, y in zip(found, wanted):
        assert_close_to_fp64(x, y.reshape(shape), torch.float32, scale=2)
    skipped = gae(*inputs, gamma=0.9, lam=0.8, cu_seqlens=cu)[0].view(12, 23)
    assert (skipped - expected)[mask.sum(1) > 2].abs().max() > 0.1, "the example would not notice skipping"
    prefix = torch.arange(23) < mask.sum(1, keepdim=True)
    inputs = rewards.nan_to_num(), values.nan_to_num(posinf=1.0), prefix
    both = [gae(*inputs, gamma=0.9, lam=0.8, masked=masked) for masked in ("skip", "zero")]
    for x, y in zip(*both):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_reference_trl_keeps_one_token_more(backend_name):
    """Responses of 2 and 4 tokens in 4 columns, by hand: TRL 1.12 has the score at the token after the last, if any.

    gamma = 1, lam = 0.5. Row 1: r = [0.1, 0.2, 3, -], V = [1, 2, 4, -] over its two tokens and the one after them:
    delta = [1.1, 2.2, -1], A = [1.95, 1.7, -1]. Row 2: r = [0, 0, 0, 3], V = 1: delta = [0, 0, 0, 2].
    """
    rewards = torch.tensor([[0.1, 0.2, 3.0, torch.nan], [0.0, 0.0, 0.0, 3.0]])
    values = torch.tensor([[1.0, 2.0, 4.0, torch.nan], [1.0, 1.0, 1.0, 1.0]])
    kept_by_trl = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    advantages, returns = gae(rewards, values, kept_by_trl, gamma=1.0, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.95, 1.7, -1.0, 0.0], [0.25, 0.5, 1.0, 2.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.95, 3.7, 3.0, 0.0], [1.25, 1.5, 2.0, 3.0]]))


@pytest.mark.parametrize("masked", ["skip", "zero"])
@pytest.mark.parametrize("case", ["gaps", "packed", "empty_rows"])
def test_reference_critic_lam_is_that_of_the_returns(backend_name, case, masked, assert_close_to_fp64):
    inputs = reference.example_inputs(case, dtype=torch.float32)
    cu, mask = inputs["cu_seqlens"], inputs["mask"]
    lengths = [mask.shape[1]] * len(mask) if cu is None else cu.diff().tolist()
    rows = list(zip(*(inputs[name].flatten().split(lengths) for name in ("rewards", "values", "mask"))))
    loop = brute_force_gae if masked == "skip" else padded_loop
    advantages, critic = (torch.cat([loop(*row, 0.99, lam) for row in rows]) for lam in (0.6, 1.0))
    returns = critic + inputs["values"].flatten().double().nan_to_num()
    options = {"gamma": 0.99, "lam": 0.6, "critic_lam": 1.0, "masked": masked, "cu_seqlens": cu}
    found = gae(inputs["rewards"], inputs["values"], mask, **options)
    for x, y in zip(found, (advantages, returns)):
        assert_close_to_fp64(x.flatten(), y, torch.float32, scale=2)
    if masked == "skip":
        shaped = run_rlhf(inputs, lam=0.6, critic_lam=1.0)
        alone, both = (run_rlhf(inputs, lam=lam) for lam in (0.6, 1.0))
        assert torch.equal(shaped.advantages, alone.advantages)
        assert_close_to_fp64(shaped.returns, both.returns.double(), torch.float32, scale=2)


def test_trap_07_reward_position(backend_name):
    """The score stands at the last kept token: EOS, or the last index of a response that fills the row."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]])
    scores = torch.tensor([2.0, 3.0, torch.nan, -1.0])
    same = torch.where(mask.bool(), -1.0, torch.nan).expand(4, 5)
    out = rlhf_advantages(scores, same, same, torch.zeros(4, 5), mask, kl_coef=0.1, whiten=False)
    expected = torch.zeros(4, 5)
    expected[0, 2], expected[1, 4], expected[3, 3] = 2.0, 3.0, -1.0
    assert torch.equal(out.rewards, expected)
    gap = torch.full((4, 5), 0.25)
    out = rlhf_advantages(scores, gap, gap * 0, gap, mask, kl_coef=0.1, whiten=False)
    torch.testing.assert_close(
        out.rewards.sum(1), torch.where(mask.any(1), scores - 0.1 * 0.25 * mask.sum(1), 0.0), rtol=1e-6, atol=1e-6
    )


def test_trap_09_whitening(backend_name):
    generator = torch.Generator().manual_seed(0)
    values = 5 + 3 * torch.randn(6, 50, generator=generator)
    mask = torch.rand(6, 50, generator=generator) < 0.7
    white = masked_whiten(values.masked_fill(~mask, torch.nan), mask)
    assert abs(white[mask].mean().item()) < 1e-6 and abs(white[mask].var().item() - 1) < 1e-5
    assert (white[~mask] == 0).all()
    kept_mean = masked_whiten(values, mask, center=False)[mask]
    assert abs(kept_mean.mean().item() - values[mask].mean().item()) < 1e-5
    assert abs(kept_mean.var().item() - 1) < 1e-5
    assert masked_whiten(torch.tensor([7.0, torch.nan]), torch.tensor([True, False])).tolist() == [0.0, 0.0]
    assert masked_whiten(torch.full((3,), 2.5)).tolist() == [0.0] * 3


@pytest.mark.parametrize("correction", [0, 1])
def test_reference_whitening_of_every_kind(backend_name, correction):
    """By the standard library's statistics: verl and TRL as it stands, OpenRLHF with a floor, its no_std_norm."""
    generator = torch.Generator().manual_seed(0)
    values = 5 + 3 * torch.randn(6, 50, generator=generator)
    mask = torch.rand(6, 50, generator=generator) < 0.7
    kept = values[mask].tolist()
    mean, variance = statistics.fmean(kept), (statistics.variance if correction else statistics.pvariance)(kept)
    for options, divisor in (
        ({}, (variance + 1e-8) ** 0.5),
        ({"eps": 0.0, "min_variance": 1e-8}, variance**0.5),
        ({"eps": 2.0, "min_variance": 25.0}, 27**0.5),
        ({"scale": False}, 1.0),
    ):
        for center in (True, False):
            white = masked_whiten(
                values.masked_fill(~mask, torch.nan), mask, center=center, correction=correction, **options
            )
            expected = torch.tensor([(x - mean) / divisor + (0 if center else mean) for x in kept])
            torch.testing.assert_close(white[mask], expected, rtol=1e-6, atol=1e-6)
            assert (white[~mask] == 0).all()


def test_reference_whitening_of_entries_that_are_the_same(backend_name):
    """They have no variance: 0 under every denominator, also for a single one."""
    for values in (torch.full((3,), 2.5), torch.tensor([2.5])):
        for options in ({"eps": 1e-12}, {"eps": 0, "min_variance": 1e-12}, {"correction": 0}, {"scale": False}):
            assert masked_whiten(values, **options).tolist() == [0.0] * len(values)


def test_trap_09_two_ranks_whiten_as_one(tmp_path):
    """Two gloo ranks with shifted data and different numbers of tokens give what one process gives for all rows."""
    script = textwrap.dedent("""
        import sys, torch, torch.distributed as dist
        from rlhf_kernels import rlhf_advantages
        rank, folder = int(sys.argv[1]), sys.argv[2]
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        rows = torch.load(f"{folder}/inputs.pt")
        mine = [x[:2] if rank == 0 else x[2:] for x in rows]
        out = rlhf_advantages(*mine, kl_coef=0.1, process_group=dist.group.WORLD)
        torch.save(out.advantages, f"{folder}/out{rank}.pt")
        dist.destroy_process_group()
    """)
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([30.0, 31.0, -4.0, -3.0, -2.0])
    tensors = [torch.randn(5, 12, generator=generator) for _ in range(3)]
    mask = torch.arange(12) < torch.tensor([[12], [3], [7], [1], [0]])
    torch.save([scores, *tensors, mask], tmp_path / "inputs.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", script, str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    together = torch.cat([torch.load(tmp_path / f"out{rank}.pt") for rank in range(2)])
    alone = rlhf_advantages(scores, *tensors, mask, kl_coef=0.1).advantages
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    first = rlhf_advantages(scores[:2], *(x[:2] for x in tensors), mask[:2], kl_coef=0.1).advantages
    assert (first - alone[:2]).abs().max() > 0.5, "the example would not notice whitening per rank"


# 3. gradients: there are none


def test_gradients_are_cut(backend_name):
    inputs = reference.example_inputs("padded", dtype=torch.float32)
    for name in ("rewards", "values", "log_probs", "scores"):
        inputs[name].requires_grad_()
    for out in (*run_gae(inputs), *run_rlhf(inputs), masked_whiten(inputs["values"], inputs["mask"])):
        assert not out.requires_grad


# 4. masked garbage


@pytest.mark.parametrize("case", ["padded", "gaps", "packed", "empty_rows"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 3e38])
def test_masked_garbage(backend_name, case, garbage):
    inputs = reference.example_inputs(case, dtype=torch.float32)
    mask = inputs["mask"]
    clean, dirty = dict(inputs), dict(inputs)
    for name in ("rewards", "values", "log_probs", "ref_log_probs"):
        clean[name] = inputs[name].masked_fill(~mask, 0.0)
        dirty[name] = inputs[name].masked_fill(~mask, garbage)
    for a, b in zip((*run_gae(clean), *run_rlhf(clean)), (*run_gae(dirty), *run_rlhf(dirty))):
        assert torch.equal(a, b)
        assert (a[~mask] == 0).all()


# 5. edges


def test_edges_empty(backend_name):
    for shape in ((0, 5), (3, 0), (0, 0)):
        x = torch.zeros(shape)
        assert [out.shape for out in gae(x, x)] == [shape] * 2
        out = rlhf_advantages(torch.zeros(shape[0]), x, x, x, x.bool(), kl_coef=0.1)
        assert [tensor.shape for tensor in out] == [shape] * 4
        assert masked_whiten(x).shape == shape
    nothing = torch.zeros(0)
    for cu in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        out = rlhf_advantages(torch.zeros(len(cu) - 1), nothing, nothing, nothing, None, kl_coef=0.1, cu_seqlens=cu)
        assert out.advantages.shape == (0,)


def test_edges_layouts(backend_name):
    """Transposed, expanded and strided inputs, integer masks and int32 offsets give the bits of the plain ones."""
    inputs = reference.example_inputs("gaps", dtype=torch.float32)
    rewards, values, mask = inputs["rewards"], inputs["values"], inputs["mask"]
    expected = gae(rewards, values, mask)
    wide = torch.full((5, 80), torch.nan)
    wide[:, 3:40] = values
    for variant in (
        gae(rewards.t().contiguous().t(), wide[:, 3:40], mask.t().contiguous().t()),
        gae(rewards, values, mask.to(torch.int64)),
        gae(torch.stack([rewards, rewards], -1)[..., 0], values, mask.to(torch.uint8)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(variant, expected))
    row = gae(rewards[:1].nan_to_num(), values[:1].nan_to_num(), mask[:1])[0]
    expanded = gae(
        rewards[:1].nan_to_num().expand(4, -1), values[:1].nan_to_num().expand(4, -1), mask[:1].expand(4, -1)
    )
    assert torch.equal(expanded[0], row.expand(4, -1))
    packed = reference.example_inputs("packed", dtype=torch.float32)
    narrow = {**packed, "cu_seqlens": packed["cu_seqlens"].to(torch.int32)}
    assert torch.equal(run_gae(packed)[0], run_gae(narrow)[0])


def test_edges_dtypes():
    """Half types are computed in fp32; float64 in gives float64, on the reference, without being asked."""
    inputs = reference.example_inputs("padded", dtype=torch.float64)
    assert all(out.dtype == torch.float64 for out in (*run_gae(inputs), *run_rlhf(inputs)))
    half = reference.example_inputs("padded", dtype=torch.float16)
    assert all(out.dtype == torch.float32 for out in (*run_gae(half), *run_rlhf(half)))


def test_edges_infinite_log_probs(backend_name):
    """A token that both models exclude has no KL; one that only the policy excludes has k3 = inf, not NaN."""
    inf = torch.inf
    log_probs, ref = torch.tensor([[-inf, -inf, -1.0]]), torch.tensor([[-inf, -1.0, -1.0]])
    options = {"kl_coef": 1.0, "whiten": False}
    zeros = torch.zeros(1, 3)
    kl = rlhf_advantages(torch.zeros(1), log_probs, ref, zeros, None, kl_estimator="k3", **options).kl
    assert kl.tolist() == [[0.0, inf, 0.0]]
    kl = rlhf_advantages(torch.zeros(1), log_probs, ref, zeros, None, kl_estimator="k1", **options).kl
    assert kl.tolist() == [[0.0, -inf, 0.0]]


# 6. bad input


def zeros():
    return torch.zeros(2, 3)


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: gae(zeros(), torch.zeros(2, 4)), "values has shape"),
        (lambda: gae(zeros(), zeros(), torch.ones(2, 4, dtype=torch.bool)), "mask has shape"),
        (lambda: gae(zeros(), zeros(), torch.ones(2, 3)), "mask has dtype float32"),
        (lambda: gae(zeros(), zeros(), lam=1.5), "lam must be a number >= 0 and <= 1, got 1.5"),
        (lambda: gae(zeros(), zeros(), gamma=-0.1), "gamma must be"),
        (lambda: gae(zeros().long(), zeros()), "rewards has dtype int64"),
        (lambda: gae(torch.zeros(3), torch.zeros(3)), "rewards has shape"),
        (lambda: gae(zeros(), zeros(), cu_seqlens=torch.tensor([0, 3])), "rewards has shape"),
        (lambda: gae(zeros()[0], zeros()[0], cu_seqlens=torch.tensor([0, 2, 1, 3])), "cu_seqlens"),
        (lambda: gae(zeros()[0], zeros()[0], cu_seqlens=torch.tensor([0, 2])), "cu_seqlens"),
        (lambda: gae(zeros(), zeros(), last_values=torch.zeros(3)), "last_values has shape"),
        (lambda: gae(zeros(), zeros().to("meta")), "values is on meta"),
        (lambda: gae(None, zeros()), "rewards must be a torch.Tensor, got NoneType"),
        (lambda: rlhf_advantages(torch.zeros(3), zeros(), zeros(), zeros(), None, kl_coef=0.1), "scores has shape"),
        (lambda: rlhf_advantages(torch.zeros(2), zeros(), zeros(), zeros(), None, kl_coef=-1), "kl_coef must be"),
        (
            lambda: rlhf_advantages(torch.zeros(2), zeros(), zeros(), zeros(), None, kl_coef=0, kl_estimator="k4"),
            "kl_estimator must be one of 'k1', 'k2', 'k3', got 'k4'",
        ),
        (
            lambda: rlhf_advantages(torch.zeros(2), zeros(), zeros(), zeros(), None, kl_coef=0, reward_clip=0),
            "reward_clip must be a number > 0, got 0",
        ),
        (lambda: gae(zeros(), zeros(), critic_lam=1.5), "critic_lam must be a number >= 0 and <= 1, got 1.5"),
        (lambda: gae(zeros(), zeros(), masked="pad"), "masked must be one of 'skip', 'zero', got 'pad'"),
        (
            lambda: gae(zeros(), zeros(), masked="zero", last_values=torch.zeros(2)),
            "last_values is given, but masked='zero' knows no last kept token",
        ),
        (lambda: masked_whiten(torch.zeros(2, 2, 2)), "values has shape"),
        (lambda: masked_whiten(zeros(), correction=2), "correction must be one of 0, 1, got 2"),
        (lambda: masked_whiten(zeros(), eps=-1.0), "eps must be a number >= 0, got -1.0"),
        (lambda: masked_whiten(zeros(), min_variance=-1.0), "min_variance must be"),
        (lambda: masked_whiten(zeros(), eps=0.0), "expected one of them to be >= 1e-12"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


# 7. contract


@pytest.mark.parametrize("case", ["gaps", "packed", "bootstrap"])
def test_contract_opcheck(backend_name, case):
    inputs = reference.example_inputs(case, dtype=torch.float32)
    for name in ("rewards", "values", "log_probs", "ref_log_probs"):
        inputs[name] = inputs[name].nan_to_num()
    ops, mask, cu = torch.ops.rlhf_kernels, inputs["mask"], inputs["cu_seqlens"]
    torch.library.opcheck(
        ops.gae_fwd.default, (inputs["rewards"], inputs["values"], mask, 0.9, 0.8, cu, inputs["last_values"])
    )
    tensors = [inputs[name] for name in ("scores", "log_probs", "ref_log_probs", "values")]
    torch.library.opcheck(ops.rlhf_advantages_fwd.default, (*tensors, mask, 0.1, 1.0, 0.95, "k3", 2.0, True, cu))
    torch.library.opcheck(ops.whiten_stats_fwd.default, (inputs["values"], mask))
    stats = torch.tensor([3.0, 0.5, 2.0], dtype=torch.float64)
    torch.library.opcheck(ops.whiten_fwd.default, (inputs["values"], mask, stats, True))


def test_contract_fullgraph(backend_name):
    inputs = reference.example_inputs("gaps", dtype=torch.float32)

    def step(scores, log_probs, ref, values, mask):
        out = rlhf_advantages(scores, log_probs, ref, values, mask, kl_coef=0.1, kl_estimator="k2", reward_clip=1.0)
        return (*out, *gae(out.rewards, values, mask))

    arguments = [inputs[name] for name in ("scores", "log_probs", "ref_log_probs", "values", "mask")]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(compiled, step(*arguments)))


@pytest.mark.slow_interpreted
def test_contract_deterministic_and_row_independent(backend_name):
    generator = torch.Generator().manual_seed(5)
    B, T = 12 if backend_name == "triton" else 120, 700  # the interpreter is slow
    tensors = [torch.randn(B, T, generator=generator) for _ in range(3)]
    scores = torch.randn(B, generator=generator)
    mask = torch.arange(T) < torch.randint(0, T + 1, (B, 1), generator=generator)
    options = {"kl_coef": 0.1, "whiten": False}
    shaped = on_threads((1, 2, 2), lambda: rlhf_advantages(scores, *tensors, mask, kl_coef=0.1))
    whole = on_threads((1, 2, 2), lambda: rlhf_advantages(scores, *tensors, mask, **options))
    assert torch.equal(shaped.returns, whole.returns)
    for b in range(0, B, B // 3):
        row = slice(b, b + 1)
        alone = rlhf_advantages(scores[row], *(x[row] for x in tensors), mask[row], **options)
        assert all(torch.equal(a, all_rows[row]) for a, all_rows in zip(alone, whole))


def test_contract_padding_and_packing_change_no_bit(backend_name):
    """A response gives the same bits padded to any length on either side and packed, whitening included."""
    generator = torch.Generator().manual_seed(6)
    lengths = torch.tensor([5, 64, 1, 33, 0, 17])
    mask = torch.arange(64) < lengths[:, None]
    tensors = [torch.randn(6, 64, generator=generator) for _ in range(3)]
    scores = torch.randn(6, generator=generator)
    padded = rlhf_advantages(scores, *tensors, mask, kl_coef=0.1)
    more = [torch.nn.functional.pad(x, (0, 9), value=torch.nan) for x in tensors]
    longer = rlhf_advantages(scores, *more, torch.nn.functional.pad(mask, (0, 9)), kl_coef=0.1)
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    packed = rlhf_advantages(scores, *(x[mask] for x in tensors), None, kl_coef=0.1, cu_seqlens=cu)
    left = [torch.full((6, 73), torch.nan) for _ in range(3)]
    left_mask = torch.arange(73) >= 73 - lengths[:, None]
    for to, x in zip(left, tensors):
        to[left_mask] = x[mask]
    pushed = rlhf_advantages(scores, *left, left_mask, kl_coef=0.1)
    for a, b, c, d in zip(padded, longer, packed, pushed):
        torch.testing.assert_close(a, b[:, :64], rtol=0, atol=0 if backend_name == "cpu" else 1e-6)
        torch.testing.assert_close(a[mask], c, rtol=0, atol=0 if backend_name == "cpu" else 1e-6)
        torch.testing.assert_close(a[mask], d[left_mask], rtol=0, atol=0 if backend_name == "cpu" else 1e-6)
