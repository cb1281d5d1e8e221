"""ppo_loss: the seven questions, SPEC section 2 (3, 4) and traps 10, 16, 20."""

import math

import pytest
import torch

from rlhf_kernels import dispatch, ppo_loss
from rlhf_kernels.cpu import ppo as native
from rlhf_kernels.reference import ppo as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEAVES = ("log_probs", "values", "entropy")
TENSORS = ("log_probs", "old_log_probs", "advantages", "mask", "values", "old_values", "returns", "entropy")
NORMALIZED = tuple(mode for mode in reference.AGG_MODES if mode != "token-sum")


def served(dtype):
    """Skip where the chosen backend says that it does not take this dtype."""
    try:
        dispatch.pick("ppo", torch.zeros(1, dtype=dtype))
    except RuntimeError as error:
        pytest.skip(str(error))


def public(inputs, **options):
    """ppo_loss on example_inputs; the weights of value loss and entropy are 0.7 and 0.3."""
    names = ("values", "old_values", "returns", "cliprange", "cliprange_high", "dual_clip", "cliprange_value")
    arguments = {name: inputs[name] for name in (*names, "entropy", "loss_agg_mode")}
    arguments["entropy_coef"] = 0.0 if inputs["entropy"] is None else 0.3
    positional = inputs["log_probs"], inputs["old_log_probs"], inputs["advantages"], inputs["mask"]
    return ppo_loss(*positional, **{"vf_coef": 0.7, **arguments, **options})


def cast(inputs, dtype, requires_grad=False):
    """The same inputs in another dtype, with fresh leaves."""
    result = dict(inputs)
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            result[name] = x.detach().to(dtype).requires_grad_(requires_grad and name in LEAVES)
    return result


def loop_ppo(inputs, loss_agg_mode):
    """(policy, value, entropy) loss in plain Python, token by token."""
    mask = inputs["mask"].tolist()
    get = {name: inputs[name].tolist() for name in ("log_probs", "old_log_probs", "advantages", *LEAVES[1:])}
    old_values, returns = inputs["old_values"].tolist(), inputs["returns"].tolist()
    low, high, dual, near = (inputs[x] for x in ("cliprange", "cliprange_high", "dual_clip", "cliprange_value"))
    sequences = []
    for b, row in enumerate(mask):
        tokens = []
        for t, keep in enumerate(row):
            if not keep:
                continue
            ratio = math.exp(get["log_probs"][b][t] - get["old_log_probs"][b][t])
            advantage, value, target = get["advantages"][b][t], get["values"][b][t], returns[b][t]
            gain = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
            if dual is not None and advantage < 0:
                gain = max(gain, dual * advantage)
            moved = old_values[b][t] + min(max(value - old_values[b][t], -near), near)
            tokens.append((-gain, 0.5 * max((value - target) ** 2, (moved - target) ** 2), get["entropy"][b][t]))
        if tokens:
            sequences.append(tokens)
    count, width = sum(map(len, sequences)), len(mask[0])
    results = []
    for part in range(3):
        sums = [sum(token[part] for token in tokens) for tokens in sequences]
        means = [total / len(tokens) for total, tokens in zip(sums, sequences, strict=True)]
        results.append(
            {
                "token-mean": sum(sums) / count,
                "token-sum": sum(sums),
                "seq-mean-token-sum": sum(sums) / len(sums),
                "seq-mean-token-mean": sum(means) / len(means),
                "seq-mean-token-sum-norm": sum(sums) / len(sums) / width,
            }[loss_agg_mode]
        )
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in reference.CASES if case != "far"])
def test_values(backend_name, dtype, case, assert_close_to_fp64):
    served(dtype)
    inputs = cast(reference.example_inputs(case, dtype=torch.float64), dtype)
    expected = reference.ppo_losses(**cast(inputs, torch.float64))
    result = public(inputs)
    scale = 10 if dtype in (torch.bfloat16, torch.float16) else 4
    assert_close_to_fp64(result.policy_loss, expected[0], dtype, scale)
    if inputs["values"] is None:
        assert result.value_loss is None
    else:
        assert_close_to_fp64(result.value_loss, expected[1], dtype, scale)
    total = expected @ torch.tensor([1, 0.7, -0.3], dtype=torch.float64)
    assert_close_to_fp64(result.loss, total, dtype, scale)


@pytest.mark.parametrize("loss_agg_mode", reference.AGG_MODES)
def test_reference(backend_name, loss_agg_mode):
    """Against a loop over tokens in plain Python, every aggregation."""
    inputs = reference.example_inputs("everything", dtype=torch.float32, seed=7)
    policy, value, entropy = loop_ppo(inputs, loss_agg_mode)
    result = public(inputs, loss_agg_mode=loss_agg_mode)
    assert result.policy_loss.item() == pytest.approx(policy, rel=1e-5, abs=1e-6)
    assert result.value_loss.item() == pytest.approx(value, rel=1e-5)
    assert result.loss.item() == pytest.approx(policy + 0.7 * value - 0.3 * entropy, rel=1e-5, abs=1e-6)


def test_reference_metrics(backend_name):
    """Each metric from its definition, over the kept tokens only."""
    inputs = reference.example_inputs("everything", dtype=torch.float32, seed=8)
    metrics = public(inputs).metrics
    mask = inputs["mask"]
    kept = {name: x[mask].double() for name, x in inputs.items() if isinstance(x, torch.Tensor) and name != "mask"}
    log_ratio = kept["log_probs"] - kept["old_log_probs"]
    ratio, advantage = log_ratio.exp(), kept["advantages"]
    clipped = torch.where(advantage > 0, ratio > 1.28, (ratio < 0.8) & (advantage < 0))
    moved = kept["values"] - kept["old_values"]
    held = kept["old_values"] + moved.clamp(-0.2, 0.2) - kept["returns"]
    held = (moved.abs() > 0.2) & (held.abs() > (kept["values"] - kept["returns"]).abs())
    error = kept["returns"] - kept["values"]
    expected = {
        "tokens": float(mask.sum()),
        "approx_kl": (log_ratio.square() / 2).mean(),
        "clip_fraction": clipped.double().mean(),
        "dual_clip_fraction": ((advantage < 0) & (ratio > 1.3)).double().mean(),
        "ratio_mean": ratio.mean(),
        "ratio_var": ratio.var(correction=0),
        "ratio_max": ratio.max(),
        "entropy": kept["entropy"].mean(),
        "value_clip_fraction": held.double().mean(),
        "explained_variance": 1 - error.var() / kept["returns"].var(),
        "value_mean": kept["values"].mean(),
        "return_mean": kept["returns"].mean(),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(float(value), rel=2e-5, abs=1e-6), name
    few = public(reference.example_inputs("plain", dtype=torch.float32)).metrics
    assert "value_clip_fraction" not in few and "entropy" not in few and "dual_clip_fraction" not in few


def test_spec_3_ptx_objective(backend_name):
    """SPEC section 2, number 3: KL 0.86 nats, penalty 0.0172, PPO-ptx objective 1.763."""
    policy = torch.tensor([[-0.15, -0.30, -0.05, -0.10, -0.08, -0.20, -0.03]], requires_grad=True)
    sft = torch.tensor([[-0.20, -0.45, -0.06, -0.12, -0.10, -0.80, -0.04]])
    kl = (policy - sft).detach().sum()
    assert round(kl.item(), 2) == 0.86 and round(0.02 * kl.item(), 4) == 0.0172
    advantages = (2.1 - 0.02 * kl).expand(1, 7)
    rl = ppo_loss(policy, policy.detach(), advantages, torch.ones(1, 7, dtype=torch.bool))
    objective = -rl.loss.item() + 0.1 * -3.2
    assert round(objective, 3) == 1.763
    rl.loss.backward()  # at ratio 1 this is the policy gradient: -A / tokens
    torch.testing.assert_close(policy.grad, -advantages / 7)


def test_spec_4_clip_range(backend_name):
    """SPEC section 2, number 4: reward 1.85 over baseline 1.20 is an advantage of 0.65; clip range 1 +- 0.2."""
    advantage = 1.85 - 1.20
    assert round(advantage, 2) == 0.65
    for sign, ratio, factor, slope in ((1, 1.5, 1.2, 0), (1, 0.5, 0.5, 0.5), (-1, 0.5, 0.8, 0), (-1, 1.5, 1.5, 1.5)):
        log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
        result = ppo_loss(log_prob, torch.zeros(1, 1), torch.full((1, 1), sign * advantage), torch.ones(1, 1).bool())
        result.loss.backward()
        assert result.loss.item() == pytest.approx(-sign * 0.65 * factor)
        assert log_prob.grad.item() == pytest.approx(-sign * 0.65 * slope)
        assert result.metrics["clip_fraction"].item() == (slope == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss_agg_mode", reference.AGG_MODES)
@pytest.mark.parametrize("case", ["plain", "everything", "empty_mask", "empty"])
def test_gradients(backend_name, dtype, loss_agg_mode, case, assert_close_to_fp64):
    """Against autograd of the definition in float64, with an upstream gradient that is not 1."""
    served(dtype)
    inputs = reference.example_inputs(case, dtype=dtype) | {"loss_agg_mode": loss_agg_mode}
    actual, exact = cast(inputs, dtype, True), cast(inputs, torch.float64, True)
    (reference.ppo_losses(**exact) @ torch.tensor([1, 0.7, -0.3], dtype=torch.float64) * 1.7).backward()
    (public(actual).loss * 1.7).backward()
    for name in LEAVES:
        if inputs[name] is not None:
            assert actual[name].grad.dtype == dtype
            assert_close_to_fp64(actual[name].grad, exact[name].grad, dtype, 4)


def test_gradients_of_the_parts(backend_name):
    """policy_loss and value_loss backpropagate by themselves, each into its own input only."""
    inputs = cast(reference.example_inputs("values", dtype=torch.float32), torch.float32, True)
    result = public(inputs)
    policy = torch.autograd.grad(result.policy_loss, [inputs["log_probs"], inputs["values"]], retain_graph=True)
    value = torch.autograd.grad(result.value_loss, [inputs["log_probs"], inputs["values"]], retain_graph=True)
    whole = torch.autograd.grad(result.loss, [inputs["log_probs"], inputs["values"]])
    assert policy[1].eq(0).all() and value[0].eq(0).all()
    torch.testing.assert_close(whole[0], policy[0])
    torch.testing.assert_close(whole[1], 0.7 * value[1])


def test_gradients_again(backend_name):
    """A retained graph gives the same gradient again, whoever owns the first; value_loss has its own at vf_coef = 0."""
    for upstream in (1.0, 0.5):
        inputs = cast(reference.example_inputs("values", dtype=torch.float32), torch.float32, True)
        loss = public(inputs).loss * upstream
        loss.backward(retain_graph=True)
        once = inputs["values"].grad.clone()
        (first,) = torch.autograd.grad(loss, inputs["values"], retain_graph=True)
        loss.backward()
        assert torch.equal(first, once) and torch.equal(inputs["values"].grad, 2 * once)
    inputs = cast(reference.example_inputs("values", dtype=torch.float32), torch.float32, True)
    result = public(inputs, vf_coef=0)
    (free,) = torch.autograd.grad(result.loss, inputs["values"], retain_graph=True)
    (own,) = torch.autograd.grad(result.value_loss, inputs["values"])
    assert free.eq(0).all()
    torch.testing.assert_close(0.7 * own, once / upstream)


def test_gradcheck():
    """Finite differences in float64, which the reference serves."""
    for seed in range(3):
        inputs = reference.example_inputs("everything", dtype=torch.float64, seed=seed)
        leaves = [torch.where(inputs["mask"], inputs[name], 0).requires_grad_() for name in LEAVES]
        assert torch.autograd.gradcheck(lambda *x, inputs=inputs: public(inputs | dict(zip(LEAVES, x))).loss, leaves)


def test_trap_10_mean_of_micro_batch_means(backend_name):
    """10 tokens of loss 1 and 200 of loss 3: the mean of means is 2.0, the token mean 2.90."""
    advantages = torch.cat([torch.full((1, 200), -1.0), torch.full((1, 200), -3.0)])
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0, 10:] = False
    zeros = torch.zeros(2, 200)

    def micro(num_items_in_batch):
        leaf = zeros.clone().requires_grad_()
        total = 0.0
        for b in range(2):
            rows = leaf[b : b + 1], zeros[b : b + 1], advantages[b : b + 1], mask[b : b + 1]
            part = ppo_loss(*rows, num_items_in_batch=num_items_in_batch).loss
            part.backward()
            total += part.item()
        return total, leaf.grad

    assert micro(None)[0] / 2 == pytest.approx(2.0)
    whole = zeros.clone().requires_grad_()
    loss = ppo_loss(whole, zeros, advantages, mask).loss
    loss.backward()
    for count in (210, torch.tensor(210)):
        total, grad = micro(count)
        assert loss.item() == pytest.approx(2.905, abs=5e-4) and total == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(grad, whole.grad)


@pytest.mark.parametrize("loss_agg_mode", NORMALIZED)
def test_trap_10_any_split_of_the_batch(backend_name, loss_agg_mode):
    """One batch of 8, 8 batches of 1, and 2 of 4: the same gradients with the global count."""
    generator = torch.Generator().manual_seed(9)
    tensors = [torch.randn(8, 12, generator=generator) for _ in range(7)]
    mask = torch.rand(8, 12, generator=generator) < torch.rand(8, 1, generator=generator)
    mask[:, 0] = True
    count = int(mask.sum()) if loss_agg_mode == "token-mean" else 8
    grads = []
    for size in (8, 1, 4):
        leaves = [tensors[i].clone().requires_grad_() for i in (0, 3, 6)]
        rows = [x.split(size) for x in (leaves[0], *tensors[1:3], mask, leaves[1], *tensors[4:6], leaves[2])]
        for log_probs, old, advantages, keep, values, old_values, returns, entropy in zip(*rows, strict=True):
            rest = {"values": values, "old_values": old_values, "returns": returns, "entropy": entropy}
            options = {"entropy_coef": 0.1, "loss_agg_mode": loss_agg_mode, "num_items_in_batch": count}
            part = ppo_loss(log_probs, old, advantages, keep, **rest, **options)
            part.loss.backward()
        grads.append([leaf.grad for leaf in leaves])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0])


def test_trap_16_padding_does_not_reach_metrics(backend_name):
    """Any amount of padding, filled with NaN, inf or the sentinel 1.0, leaves loss and metrics as they are."""
    inputs = reference.example_inputs("everything", dtype=torch.float32)
    before, padded = public(inputs), dict(inputs)
    for garbage in (torch.nan, torch.inf, 1.0):
        for name, x in inputs.items():
            if isinstance(x, torch.Tensor):
                fill = False if name == "mask" else garbage
                padded[name] = torch.cat([x, torch.full((x.shape[0], 9), fill, dtype=x.dtype)], 1)
        after = public(padded)
        torch.testing.assert_close(after.loss, before.loss)
        for name, value in before.metrics.items():
            torch.testing.assert_close(after.metrics[name], value, msg=name)


def test_trap_20_value_clipping_is_visible(backend_name):
    """A clip range of 0.2 beside scores around 10 stops the value function; the metric says so."""
    old_values, returns = torch.zeros(1, 6), torch.full((1, 6), 10.0)
    values = torch.full((1, 6), 0.5).requires_grad_()
    zeros, mask = torch.zeros(1, 6), torch.ones(1, 6, dtype=torch.bool)
    arguments = {"old_values": old_values, "returns": returns}
    stuck = ppo_loss(zeros, zeros, zeros, mask, values=values, **arguments)
    stuck.loss.backward()
    assert stuck.metrics["value_clip_fraction"].item() == 1.0 and values.grad.eq(0).all()
    free = ppo_loss(zeros, zeros, zeros, mask, values=values, **arguments, cliprange_value=None)
    free.loss.backward()
    assert free.metrics["value_clip_fraction"].item() == 0.0 and values.grad.lt(0).all()

    scaled = {name: x * 50 for name, x in arguments.items()}  # and values and range: the loss scales by 50^2
    alike = ppo_loss(zeros, zeros, zeros, mask, values=values.detach() * 50, **scaled, cliprange_value=0.2 * 50)
    assert alike.value_loss.item() == pytest.approx(2500 * stuck.value_loss.item(), rel=1e-6)
    for name in ("value_clip_fraction", "ratio_mean"):
        assert alike.metrics[name].item() == stuck.metrics[name].item()


def test_dual_clip_bounds_the_loss(backend_name):
    """With A < 0 and a ratio of e^5 the loss is -A * 3 and has no gradient; with A > 0 nothing changes."""
    log_probs = torch.full((1, 2), 5.0).requires_grad_()
    arguments = torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2).bool()
    result = ppo_loss(log_probs, *arguments, dual_clip=3.0, loss_agg_mode="token-sum")
    result.loss.backward()
    assert result.loss.item() == pytest.approx(3.0 - 1.2) and log_probs.grad.eq(0).all()
    assert result.metrics["dual_clip_fraction"].item() == 0.5


def test_masked_garbage(backend_name):
    """NaN and inf under mask 0 reach neither the loss nor any gradient."""
    for garbage in (torch.nan, torch.inf, -torch.inf):
        inputs = reference.example_inputs("everything", dtype=torch.float32)
        for name, x in inputs.items():
            if isinstance(x, torch.Tensor) and name != "mask":
                inputs[name] = torch.where(inputs["mask"], x, garbage)
        inputs = cast(inputs, torch.float32, True)
        result = public(inputs)
        result.loss.backward()
        assert result.loss.isfinite() and all(metric.isfinite() for metric in result.metrics.values())
        for name in LEAVES:
            assert inputs[name].grad[~inputs["mask"]].eq(0).all() and inputs[name].grad.isfinite().all()


def test_edges(backend_name):
    """Nothing kept, nothing there, one token, overflowing ratios, an integer mask, strided and expanded inputs."""
    for case in ("empty_mask", "empty"):
        inputs = cast(reference.example_inputs(case, dtype=torch.float32), torch.float32, True)
        result = public(inputs)
        result.loss.backward()
        assert result.loss.item() == 0 and inputs["log_probs"].grad.eq(0).all()
        assert result.metrics["tokens"].item() == 0 and result.metrics["approx_kl"].isnan()

    old, advantages, mask = torch.zeros(1, 3), torch.tensor([[1.0, 0.0, -1.0]]), torch.ones(1, 3).bool()
    far = torch.tensor([[200.0, 200.0, -200.0]], requires_grad=True)  # exp(200) is inf in fp32
    result = ppo_loss(far, old, advantages, mask)
    result.loss.backward()
    assert result.loss.item() == pytest.approx((-1.2 - 0 + 0.8) / 3) and far.grad.eq(0).all()

    broken = ppo_loss(torch.tensor([[0.0, torch.nan, 0.0]]), old, advantages, mask)  # also where A = 0
    assert broken.loss.isnan() and broken.metrics["ratio_max"].isnan()

    wide = torch.randn(4, 20, generator=torch.Generator().manual_seed(10))
    advantages = torch.randn(4, 1, generator=torch.Generator().manual_seed(11)).expand(4, 10)
    mask = torch.ones(10, dtype=torch.int64).expand(4, 10)
    strided = ppo_loss(wide[:, ::2], wide[:, 1::2], advantages, mask).loss
    plain = ppo_loss(wide[:, ::2].contiguous(), wide[:, 1::2].contiguous(), advantages.contiguous(), mask.bool()).loss
    torch.testing.assert_close(strided, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_log_probs": torch.zeros(2, 4)}, r"old_log_probs has shape \[2, 4\], expected \[2, 3\]"),
        ({"log_probs": torch.zeros(3)}, r"log_probs has shape \[3\].*\[B, T\]"),
        ({"advantages": torch.zeros(2, 3).long()}, "advantages has dtype int64"),
        ({"response_mask": torch.zeros(2, 3)}, "response_mask has dtype float32"),
        ({"response_mask": torch.zeros(2, 1).bool()}, r"response_mask has shape \[2, 1\]"),
        ({"cliprange": -0.1}, "cliprange must be a number >= 0 and <= 1, got -0.1"),
        ({"cliprange_high": -1}, "cliprange_high must be"),
        ({"dual_clip": 1.0}, "dual_clip must be a number > 1, got 1.0"),
        ({"vf_coef": -1}, "vf_coef must be"),
        ({"entropy_coef": 0.1}, "entropy is None, but entropy_coef=0.1"),
        ({"values": torch.zeros(2, 3)}, "returns is None, but values is given"),
        ({"returns": torch.zeros(2, 3)}, "returns is given but values is None"),
        ({"values": torch.zeros(2, 3), "returns": torch.zeros(2, 3)}, "old_values is None, but cliprange_value=0.2"),
        ({"loss_agg_mode": "mean"}, "loss_agg_mode must be one of 'token-mean'"),
        ({"loss_agg_mode": "token-sum", "num_items_in_batch": 4}, "num_items_in_batch has no meaning"),
        ({"num_items_in_batch": 0}, "num_items_in_batch must be a number > 0"),
        ({"num_items_in_batch": torch.ones(2)}, r"num_items_in_batch has shape \[2\]"),
    ],
)
def test_bad_input(change, message):
    names = ("log_probs", "old_log_probs", "advantages")
    arguments = {name: torch.zeros(2, 3) for name in names} | {"response_mask": torch.ones(2, 3).bool()} | change
    with pytest.raises(ValueError, match=message):
        ppo_loss(**arguments)


def test_contract(backend_name):
    """opcheck, fullgraph compilation, the same bits twice, retained graph, no_grad, autocast, detached metrics."""
    inputs = cast(reference.example_inputs("everything", dtype=torch.float32), torch.float32, True)
    for name in LEAVES:
        inputs[name] = torch.where(inputs["mask"], inputs[name].detach(), 0).requires_grad_()
    numbers = [inputs[x] for x in ("cliprange", "cliprange_high", "dual_clip", "cliprange_value")] + [0.7, 0.3]
    arguments = (*(inputs[name] for name in TENSORS), None, numbers, "token-mean")
    torch.library.opcheck(torch.ops.rlhf_kernels.ppo_fwd.default, arguments)
    for upstream in ((torch.rand(()), None, None), (None, torch.rand(()), torch.rand(()))):
        saved = torch.rand(2, 3), torch.rand(2, 3), torch.rand(0)
        torch.library.opcheck(torch.ops.rlhf_kernels.ppo_bwd.default, (*upstream, *saved, 0.7))

    leaves = [inputs[name] for name in LEAVES]
    graph = {"fullgraph": True, "backend": "aot_eager"}
    compiled = torch.compile(lambda *x: public(inputs | dict(zip(LEAVES, x))), **graph)
    eager, traced = public(inputs), compiled(*leaves)
    assert torch.equal(traced.loss, eager.loss)
    expected = torch.autograd.grad(eager.loss, leaves, retain_graph=True)
    for other in (torch.autograd.grad(traced.loss, leaves), torch.autograd.grad(eager.loss, leaves)):
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))
    assert torch.equal(public(inputs).loss, eager.loss)
    assert not any(metric.requires_grad for metric in eager.metrics.values())
    annealed = torch.compile(lambda x, c: public(inputs | {"log_probs": x}, cliprange=c).loss, **graph)
    for cliprange in (0.3, 0.2, 0.1):  # a float that changes becomes symbolic
        assert torch.equal(annealed(leaves[0], cliprange), public(inputs, cliprange=cliprange).loss)
    with torch.no_grad(), torch.autocast(eager.loss.device.type, torch.bfloat16):
        assert torch.equal(public(inputs).loss, eager.loss)


def test_contract_rows_are_independent(backend_name):
    """With a global count, a sequence's gradient does not depend on the other sequences of the batch."""
    inputs = reference.example_inputs("values", dtype=torch.float32)
    whole = cast(inputs, torch.float32, True)
    public(whole, num_items_in_batch=65).loss.backward()
    for b in range(5):
        row = {name: x[b : b + 1] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        alone = cast(row, torch.float32, True)
        public(alone, num_items_in_batch=65).loss.backward()
        for name in ("log_probs", "values"):
            torch.testing.assert_close(alone[name].grad[0], whole[name].grad[b], rtol=1e-6, atol=0)


def random_inputs(B, T, seed=0, **options):
    """Arguments of ppo_fwd of any shape, with NaN under the mask's zeros, an empty row, and A = 0 here and there."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=generator) < torch.rand(B, 1, generator=generator) * 2
    mask[B // 2] = B < 2
    tensors = {name: torch.randn(B, T, generator=generator) for name in TENSORS}
    tensors["log_probs"] = tensors["old_log_probs"] + 0.3 * tensors["log_probs"]
    tensors["advantages"] *= torch.rand(B, T, generator=generator) < 0.9
    for name, near in (("old_values", "returns"), ("values", "old_values")):
        tensors[name] = 0.4 * tensors[name] + tensors[near]
    kept = {name: torch.where(mask, x, torch.nan) for name, x in tensors.items()}
    return reference.example_inputs("everything", dtype=torch.float32) | kept | {"mask": mask} | options


def assert_native_is_exact(inputs, assert_close_to_fp64):
    """Every result against the reference in float64; a statistic is NaN where that one is."""
    for actual, exact in zip(native.ppo_fwd(**inputs), reference.ppo_fwd(**cast(inputs, torch.float64)), strict=True):
        assert torch.equal(actual.isnan(), exact.isnan())
        known = ~exact.isnan()
        assert_close_to_fp64(actual[known], exact[known].float().double(), torch.float32, 4)


@pytest.mark.parametrize("loss_agg_mode", reference.AGG_MODES)
@pytest.mark.parametrize("case", reference.CASES)
def test_values_isa(isa, case, loss_agg_mode, assert_close_to_fp64):
    inputs = reference.example_inputs(case, dtype=torch.float32) | {"loss_agg_mode": loss_agg_mode}
    assert_native_is_exact(inputs, assert_close_to_fp64)


@pytest.mark.parametrize("T", [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 341, 342, 1023, 1024, 1025, 11000])
def test_values_every_width(isa, T, assert_close_to_fp64):
    """Rows that fill a vector or a block, by one too few and one too many; several pieces; options absent in turn."""
    options = [
        {},
        {"old_values": None, "cliprange_value": None, "dual_clip": None},
        {"entropy": None, "normalizer": torch.tensor(7.0)},
        {"normalizer": torch.tensor(0.5), "value_scale": 0.5, "entropy_scale": -3.0},
        {"values": None, "old_values": None, "returns": None},
    ]
    for seed, (mode, change) in enumerate(zip(reference.AGG_MODES, options, strict=True)):
        assert_native_is_exact(random_inputs(3, T, seed, loss_agg_mode=mode, **change), assert_close_to_fp64)


def test_variances_do_not_cancel(isa):
    """Returns of 1000 +- 1, ratios of 20 +- 1, and outliers in front; exactly equal numbers have no variance at all."""

    def spread(function, inputs):
        stats = dict(zip(reference.STATS, function(**inputs)[-1].tolist(), strict=True))
        return stats["ratio_var"], 1 - stats["explained_variance"]

    inputs = random_inputs(5, 9000)
    inputs |= {name: inputs[name] + 1000 for name in ("values", "old_values", "returns")}
    inputs["log_probs"] = inputs["old_log_probs"] + 3 + 0.05 * inputs["advantages"]
    inputs["returns"][0, :3] = 1e6
    exact = spread(reference.ppo_fwd, cast(inputs, torch.float64))
    assert spread(native.ppo_fwd, inputs) == pytest.approx(exact, rel=1e-4)
    equal = {"log_probs": inputs["old_log_probs"], "returns": torch.full((5, 9000), 0.1)}
    assert spread(native.ppo_fwd, inputs | equal) == (0, math.inf)


def test_contract_isa(isa, monkeypatch):
    """The same bits on one thread and on two; with a given count a row has the same bits alone as in its batch."""
    inputs = random_inputs(37, 1100, normalizer=torch.tensor(9.0), loss_agg_mode="seq-mean-token-mean")
    results = []
    for count in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results.append(native.ppo_fwd(**inputs))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*results, strict=True))
    row = {name: x[7:8] if isinstance(x, torch.Tensor) and x.dim() else x for name, x in inputs.items()}
    assert all(torch.equal(a, b[7:8]) for a, b in zip(native.ppo_fwd(**row)[1:4], results[0][1:4], strict=True))
