"""Importance weights and the masks beside them: against loops over tokens in Python, every level, mode and gate."""

import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from rlhf_kernels import Gate, high_entropy_mask, importance_weights, off_policy_mask, policy_loss

MASK = torch.rand(7, 11, generator=torch.Generator().manual_seed(3)) < 0.7
MASK[2], MASK[4] = False, True
LEVELS = ("token", "sequence", "sequence-mean")
DIVERGENCES = ("k2", "k3", "binary_kl", "tv")


def example(dtype=torch.float64, spread=0.4):
    """Log-probs of the trained policy and of the rollout's, NaN where they are masked."""
    generator = torch.Generator().manual_seed(0)
    new = -torch.rand(MASK.shape, generator=generator, dtype=torch.float64).mul(4).add(0.5)
    old = (new + spread * torch.randn(MASK.shape, generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
    return [torch.where(MASK, x, torch.nan).to(dtype) for x in (new, old)]


def statistic(name, new, old):
    """Of one token, from its two log-probs."""
    p, q = math.exp(old), math.exp(new)
    if name == "binary_kl":
        p, q = (min(max(x, 1e-6), 1 - 1e-6) for x in (p, q))
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return {"k2": (new - old) ** 2 / 2, "k3": q / p - 1 - (new - old), "tv": abs(p - q)}[name]


def of_sequence(values, level):
    return {"sequence": sum, "sequence-mean": lambda x: sum(x) / len(x), "sequence-max": max}[level](values)


def loop(new, old, mask, level, mode, low, high, gates=()):
    """(weights, held at a bound, filtered), in Python's floats, token by token."""
    low, high = low or 0.0, high or math.inf
    tables = [[[0.0] * mask.shape[1] for _ in mask] for _ in range(3)]
    for b, keep in enumerate(mask.tolist()):
        kept = [t for t, k in enumerate(keep) if k]
        pairs = {t: (new[b, t].item(), old[b, t].item()) for t in kept}
        gaps = [x - y for x, y in pairs.values()]
        for t in kept:
            gap = pairs[t][0] - pairs[t][1]
            ratio = math.exp(gap if level == "token" else of_sequence(gaps, level))
            outside, stopped = not low <= ratio <= high, False
            for gate in gates:
                if gate.statistic == "ratio":
                    found = math.exp(gap if gate.level == "token" else of_sequence(gaps, gate.level))
                elif gate.level == "token":
                    found = statistic(gate.statistic, *pairs[t])
                else:
                    found = of_sequence([statistic(gate.statistic, *pair) for pair in pairs.values()], gate.level)
                stopped |= not (gate.low or -math.inf) <= found <= (gate.high or math.inf)
            filtered = stopped or (outside and mode == "mask")
            weight = min(max(ratio, low), high) if mode == "truncate" else ratio
            for table, x in zip(tables, (0.0 if filtered else weight, outside and not filtered, filtered)):
                table[b][t] = float(x)
    return (torch.tensor(table, dtype=torch.float64) for table in tables)


GATES = [(), (Gate("ratio", low=0.7, high=1.3),), (Gate("ratio", "sequence-mean", 0.95, 1.05),)]
GATES += [(Gate("ratio", "sequence", high=1.2), Gate("tv", high=0.05))]
MEDIANS = {"k2": 0.03, "k3": 0.03, "binary_kl": 0.003, "tv": 0.03}
TIMES = {"token": 1, "sequence": 14, "sequence-mean": 2, "sequence-max": 6}
GATES += [(Gate(name, level, high=MEDIANS[name] * TIMES[level]),) for name in DIVERGENCES for level in TIMES]


# 1, 2. values: against a loop in Python, and by hand


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("low,high", [(None, None), (None, 1.2), (0.8, 1.3), (0.9, None)], ids=str)
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", LEVELS)
def test_values(level, mode, low, high, dtype, assert_close_to_fp64):
    new, old = example(dtype)
    out = importance_weights(new, old, MASK, level=level, mode=mode, low=low, high=high)
    expected, held, filtered = loop(new.double(), old.double(), MASK, level, mode, low, high)
    assert out.weights.dtype == dtype
    assert_close_to_fp64(out.weights, expected, dtype, scale=2)
    check_metrics(out.metrics, new, old, expected, held, filtered, dtype)


@pytest.mark.parametrize("gates", GATES, ids=str)
def test_values_of_gates(gates, assert_close_to_fp64):
    new, old = example()
    out = importance_weights(new, old, MASK, high=1.5, gates=gates)
    expected, held, filtered = loop(new, old, MASK, "token", "truncate", None, 1.5, gates)
    assert not gates or 0 < filtered[MASK].mean() < 1, "the example would not notice this gate"
    assert_close_to_fp64(out.weights, expected, torch.float64)
    check_metrics(out.metrics, new, old, expected, held, filtered, torch.float64)


def check_metrics(metrics, new, old, weights, held, filtered, dtype):
    """Against plain means over the kept tokens."""
    w, gap = weights[MASK], (new - old)[MASK].double()
    lost = [row[keep].mean() for row, keep in zip(filtered, MASK) if keep.any()]
    expected = {
        "effective_sample_size": w.sum() ** 2 / (len(w) * (w * w).sum()) if w.any() else 0.0,
        "truncated_fraction": held[MASK].mean(),
        "filtered_fraction": filtered[MASK].mean(),
        "filtered_sequences": sum(x == 1 for x in lost) / len(lost),
        "weight_mean": w.mean(),
        "weight_min": w.min(),
        "weight_max": w.max(),
        "rollout_kl": -gap.mean(),
        "rollout_kl_k3": (gap.exp() - 1 - gap).mean(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].dtype == dtype and metrics[name].shape == ()
        assert metrics[name].item() == pytest.approx(float(value), rel=1e-5, abs=1e-6), name


def test_reference_by_hand():
    """Probabilities 0.4, 0.9, 0.1 against 0.1, 0.9, 0.2: ratios 4, 1, 1/2; their product is 2."""
    new, old = (torch.tensor([x]).log() for x in ([0.4, 0.9, 0.1], [0.1, 0.9, 0.2]))
    mask = torch.ones(1, 3, dtype=torch.bool)
    for options, expected in (
        ({}, [4, 1, 0.5]),
        ({"high": 2.0}, [2, 1, 0.5]),
        ({"low": 0.8, "high": 2.0}, [2, 1, 0.8]),
        ({"low": 0.8, "high": 2.0, "mode": "mask"}, [0, 1, 0]),
        ({"level": "sequence"}, [2, 2, 2]),
        ({"level": "sequence", "high": 1.5}, [1.5, 1.5, 1.5]),
        ({"level": "sequence", "high": 1.5, "mode": "mask"}, [0, 0, 0]),
        ({"level": "sequence-mean"}, [2 ** (1 / 3)] * 3),
        ({"gates": Gate("tv", high=0.25)}, [0, 1, 0.5]),
        ({"gates": Gate("tv", "sequence-mean", high=0.14)}, [4, 1, 0.5]),
        ({"gates": Gate("tv", "sequence-mean", high=0.13)}, [0, 0, 0]),
        ({"gates": Gate("ratio", "sequence-mean", high=1.3)}, [4, 1, 0.5]),
    ):
        found = importance_weights(new, old, mask, **options).weights
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float32))
    metrics = importance_weights(new, old, mask, high=2.0).metrics
    assert metrics["effective_sample_size"].item() == pytest.approx(3.5**2 / (3 * 5.25))


def test_weights_enter_the_policy_loss():
    """The product of weight and surrogate, with every token in the mean."""
    new, old = (torch.tensor([x]).log() for x in ([0.4, 0.9, 0.1], [0.1, 0.9, 0.2]))
    mask = torch.ones(1, 3, dtype=torch.bool)
    weights = importance_weights(new, old, mask, low=0.5, high=2.0, mode="mask").weights
    loss = policy_loss(new, new, torch.tensor([3.0]), mask, weights=weights)
    assert loss.loss.item() == pytest.approx(-3.0 * (0 + 1 + 0.5) / 3)


# 3. gradients: there are none


def test_gradients_are_cut():
    new, old = (x.requires_grad_() for x in example())
    out = importance_weights(new, old, MASK, level="sequence", high=2.0, gates=Gate("k3", high=0.1))
    assert not any(x.requires_grad for x in (out.weights, *out.metrics.values()))
    assert not off_policy_mask(new, old, new, MASK, threshold=0.1).requires_grad
    assert not high_entropy_mask(-new, MASK, 0.5).requires_grad


# 4. masked garbage


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("gates", [(), *GATES[2:]], ids=str)
def test_masked_garbage(gates, garbage):
    options = {"level": "sequence-mean", "mode": "mask", "high": 1.2, "gates": gates}
    clean, dirty = ([torch.where(MASK, x, fill) for x in example()] for fill in (0.0, garbage))
    expected, found = (importance_weights(*x, MASK, **options) for x in (clean, dirty))
    assert torch.equal(found.weights, expected.weights) and (found.weights[~MASK] == 0).all()
    assert all(torch.equal(found.metrics[name], x) for name, x in expected.metrics.items())


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_masked_garbage_of_the_masks(garbage):
    (new, old), signs = example(), torch.where(MASK, torch.randn(MASK.shape), garbage)
    dirty = [torch.where(MASK, x, garbage) for x in (new, old)]
    clean = [torch.where(MASK, x, 0.0) for x in (new, old, signs)]
    found = off_policy_mask(*dirty, signs, MASK, threshold=0.0)
    assert torch.equal(found, off_policy_mask(*clean, MASK, threshold=0.0)) and not found[~MASK].any()
    found = high_entropy_mask(dirty[0].neg(), MASK, 0.3)
    assert torch.equal(found, high_entropy_mask(clean[0].neg(), MASK, 0.3)) and not found[~MASK].any()


# 5. edges


def test_edges_of_infinite_log_probs():
    """Excluded by both: no correction. By the trained policy alone: weight 0. By the rollout alone: beyond bounds."""
    inf = math.inf
    new, old = torch.tensor([[-inf, -inf, -1.0, -1.0]]), torch.tensor([[-inf, -1.0, -inf, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert importance_weights(new, old, mask).weights.tolist() == [[1, 0, inf, 1]]
    assert importance_weights(new, old, mask, high=2.0).weights.tolist() == [[1, 0, 2, 1]]
    assert importance_weights(new, old, mask, high=2.0, mode="mask").weights.tolist() == [[1, 0, 0, 1]]
    for name in DIVERGENCES[:2]:
        assert importance_weights(new, old, mask, gates=Gate(name, high=9.0)).weights.tolist() == [[1, 0, 0, 1]]


def test_edges_of_ratios_that_overflow():
    """Gaps of 200 nats: the bounds hold, and the exponential's overflow is beyond them."""
    new, old = torch.tensor([[-1.0, -201.0]]), torch.tensor([[-201.0, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert importance_weights(new, old, mask, low=0.5, high=2.0).weights.tolist() == [[2.0, 0.5]]
    assert importance_weights(new, old, mask, low=0.5, high=2.0, mode="mask").weights.tolist() == [[0.0, 0.0]]
    assert importance_weights(new, old, mask, level="sequence", high=2.0).weights.tolist() == [[1.0, 1.0]]


def test_edges_show_a_missing_log_prob():
    """A kept NaN passes no test silently: it is in the weights and in the metrics."""
    new, old = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, torch.nan]])
    for options in ({"high": 2.0}, {"high": 2.0, "mode": "mask"}, {"gates": Gate("k3", high=1.0)}):
        out = importance_weights(new, old, torch.ones(1, 2, dtype=torch.bool), **options)
        assert out.weights[0, 0] == 1 and out.weights[0, 1].isnan() and out.metrics["weight_mean"].isnan()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 4)])
def test_edges_nothing_kept(shape):
    nothing, mask = torch.full(shape, torch.nan), torch.zeros(shape, dtype=torch.bool)
    for level in LEVELS:
        gates = tuple(Gate("k3", each, high=1.0) for each in TIMES)
        out = importance_weights(nothing, nothing, mask, level=level, high=2.0, gates=gates)
        assert out.weights.shape == shape and not out.weights.any()
        assert all(x.isnan() for x in out.metrics.values())
    assert not off_policy_mask(nothing, nothing, nothing, mask, threshold=0.1).any()
    assert high_entropy_mask(nothing, mask, 0.5).shape == shape and not high_entropy_mask(nothing, mask, 0.5).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_edges_layouts_and_half_types(dtype):
    new, old = (torch.where(MASK, x, 0.0).to(dtype) for x in example())
    options = {"level": "sequence", "high": 2.0, "gates": Gate("binary_kl", high=0.1)}
    expected = importance_weights(new.float(), old.float(), MASK, **options)
    found = importance_weights(new.t().contiguous().t(), old, MASK.t().contiguous().t().int(), **options)
    assert found.weights.dtype == torch.float32 and torch.equal(found.weights, expected.weights)
    assert all(torch.equal(found.metrics[name], x) for name, x in expected.metrics.items())


# the masks: against Python's loops


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_high_entropy_mask(quantile, dtype):
    """At least the quantile of the kept entropies, taken between two of them; some are equal, or all."""
    generator = torch.Generator().manual_seed(0)
    entropy = torch.randn(MASK.shape, generator=generator, dtype=torch.float64).abs().to(dtype)
    entropy[0, :4] = entropy[0, 0]
    for values in (entropy, torch.full(MASK.shape, 0.3, dtype=dtype)):
        kept = sorted(values[MASK].tolist())
        place = quantile * (len(kept) - 1)
        below, above = kept[math.floor(place)], kept[math.ceil(place)]
        threshold = below + (above - below) * (place - math.floor(place))
        expected = MASK & (values.double() >= threshold)
        found = high_entropy_mask(values.masked_fill(~MASK, torch.nan), MASK, quantile)
        assert found.dtype == torch.bool and torch.equal(found, expected)


RANK = textwrap.dedent("""
    import sys, torch, torch.distributed as dist
    from rlhf_kernels import high_entropy_mask
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    entropy, mask = (x[2 * rank : 2 * rank + 2] for x in torch.load(f"{folder}/inputs.pt"))
    torch.save(high_entropy_mask(entropy, mask, 0.8, process_group=dist.group.WORLD), f"{folder}/out{rank}.pt")
    dist.destroy_process_group()
""")


def test_high_entropy_mask_of_two_ranks_is_of_one_batch(tmp_path):
    entropy = torch.randn(4, 11, generator=torch.Generator().manual_seed(0)).abs()
    entropy[:2] += 1.0
    torch.save([entropy, MASK[3:]], tmp_path / "inputs.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    together = torch.cat([torch.load(tmp_path / f"out{rank}.pt") for rank in range(2)])
    assert torch.equal(together, high_entropy_mask(entropy, MASK[3:], 0.8))
    assert not torch.equal(together[2:], high_entropy_mask(entropy[2:], MASK[5:], 0.8)), "as each rank alone"


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 11)], ids=str)
def test_off_policy_mask(shape):
    new, old = example(spread=2.0)
    advantages = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    for threshold in (-0.8, -0.3, 0.7):
        found = off_policy_mask(new, old, advantages, MASK, threshold=threshold)
        for b, keep in enumerate(MASK.tolist()):
            gaps = [(old - new)[b, t].item() for t, k in enumerate(keep) if k]
            far = bool(gaps) and sum(gaps) / len(gaps) > threshold
            for t, k in enumerate(keep):
                advantage = advantages[b, t] if shape == (7, 11) else advantages.flatten()[b]
                assert found[b, t].item() == (k and not (far and advantage < 0))
    assert torch.equal(found, MASK) and off_policy_mask(new, old, advantages, MASK, threshold=-0.8).sum() < MASK.sum()


# 6. bad input

ROWS, ALL = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: importance_weights(ROWS.long(), ROWS, ALL), "log_probs has dtype int64"),
        (lambda: importance_weights(ROWS[0], ROWS[0], ALL[0]), "log_probs has shape [3], expected [*, *] ([B, T])"),
        (lambda: importance_weights(ROWS, ROWS[:1], ALL), "rollout_log_probs has shape [1, 3]"),
        (lambda: importance_weights(ROWS, ROWS, ALL[:1]), "mask has shape"),
        (lambda: importance_weights(ROWS, ROWS.to("meta"), ALL), "rollout_log_probs is on meta"),
        (lambda: importance_weights(ROWS, ROWS, ALL, level="row"), "level must be one of 'token', 'sequence', "),
        (
            lambda: importance_weights(ROWS, ROWS, ALL, mode="clip"),
            "mode must be one of 'truncate', 'mask', got 'clip'",
        ),
        (lambda: importance_weights(ROWS, ROWS, ALL, high=0.0), "high must be a number > 0, got 0.0"),
        (lambda: importance_weights(ROWS, ROWS, ALL, low=2.0, high=1.0), "low is 2.0, expected at most high, 1.0"),
        (lambda: importance_weights(ROWS, ROWS, ALL, gates=("k3",)), "gates must hold Gate(...), got 'k3'"),
        (lambda: Gate("kl", high=1.0), "statistic must be one of 'ratio', 'k2', "),
        (
            lambda: Gate("ratio", "sequence-max", high=1.0),
            "level must be one of 'token', 'sequence', 'sequence-mean', got",
        ),
        (lambda: Gate("tv", low=0.1, high=1.0), "low is 0.1, but 'tv' is a divergence, which high alone bounds"),
        (lambda: Gate("tv"), "low and high are both None, which every token passes"),
        (lambda: high_entropy_mask(ROWS, ALL, 1.5), "quantile must be a number >= 0 and <= 1, got 1.5"),
        (lambda: high_entropy_mask(ROWS[0], ALL[0], 0.5), "entropy has shape [3]"),
        (lambda: high_entropy_mask(ROWS, ALL[:1], 0.5), "mask has shape"),
        (lambda: off_policy_mask(ROWS, ROWS, torch.zeros(3), ALL, threshold=0.1), "advantages has shape [3]"),
        (lambda: off_policy_mask(ROWS, ROWS, ROWS, ALL, threshold="0.1"), "threshold must be a number, got '0.1'"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


# 7. contract


@pytest.mark.parametrize("gates", [(), GATES[3], (Gate("binary_kl", "sequence-max", high=0.05),)], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_contract_fullgraph_and_same_bits(level, gates):
    new, old = example(torch.float32)

    def step(new, old, mask):
        out = importance_weights(new, old, mask, level=level, mode="mask", low=0.5, high=2.0, gates=gates)
        kept = off_policy_mask(new, old, old, mask, threshold=0.1)
        return out.weights, *out.metrics.values(), kept, high_entropy_mask(old.neg(), mask, 0.8)

    torch._dynamo.reset()
    plain = step(new, old, MASK)
    for found in (step(new, old, MASK), torch.compile(step, fullgraph=True, backend="aot_eager")(new, old, MASK)):
        assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))


def test_contract_rows_do_not_know_each_other():
    new, old = example(torch.float32)
    options = {"level": "sequence", "high": 2.0, "gates": Gate("k2", "sequence-mean", high=0.1)}
    whole = importance_weights(new, old, MASK, **options).weights
    for b in range(len(MASK)):
        alone = importance_weights(new[b : b + 1], old[b : b + 1], MASK[b : b + 1], **options).weights
        assert torch.equal(alone[0], whole[b])
