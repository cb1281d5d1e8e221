"""Log-probs, cross-entropy, PPO loss and KL from hidden states and the LM head."""

import math

import pytest
import torch
import torch.nn.functional as F

import rlhf_kernels as rk
from rlhf_kernels import _linear_ops as ops
from rlhf_kernels import _linear_walk
from rlhf_kernels import logprobs as logprobs_module
from rlhf_kernels.reference import _head
from rlhf_kernels.reference import linear as reference
from rlhf_kernels.reference.kl import kl_divergence

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAVES = ("hidden_states", "weight", "bias")


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_leaves(inputs, dtype):
    """The inputs with fresh leaves in `dtype`, and the list of these leaves."""
    leaves = {k: inputs[k].detach().to(dtype, copy=True).requires_grad_() for k in LEAVES if inputs.get(k) is not None}
    return {**inputs, **leaves}, list(leaves.values())


def exact(inputs):
    """The definition with full logits in float64: (leaves, log-probs, entropy)."""
    inputs, leaves = with_leaves(inputs, torch.float64)
    inputs = {k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in inputs.items()}
    return leaves, *reference.linear_logprobs(inputs.pop("hidden_states"), **inputs)


def gradients(leaves, *outputs):
    """Gradients of one fixed weighted sum of the finite outputs; the graph stays."""
    total = 0.0
    for x in outputs:
        weights = torch.linspace(-1.0, 2.0, x.numel(), dtype=torch.float64).view(x.shape)
        total = total + (torch.where(torch.isfinite(x), x, 0.0) * weights.to(x.dtype)).sum()
    return torch.autograd.grad(total, leaves, retain_graph=True)


@pytest.mark.parametrize("chunk_size", (None, 1, 4))
@pytest.mark.parametrize("case", reference.CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(backend_name, dtype, case, chunk_size, assert_close_to_fp64):
    inputs = reference.example_inputs(case, dtype=dtype)
    leaves64, logprobs64, entropy64 = exact(inputs)
    inputs, leaves = with_leaves(inputs, dtype)
    logprobs, entropy = rk.linear_logprobs(**inputs, return_entropy=True, chunk_size=chunk_size)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert_close_to_fp64(logprobs, logprobs64, torch.float32)
    assert_close_to_fp64(entropy, entropy64, torch.float32)
    assert torch.equal(logprobs, rk.linear_logprobs(**inputs, chunk_size=chunk_size))
    for ours, theirs in (((logprobs,), (logprobs64,)), ((entropy,), (entropy64,)), ((logprobs, entropy),) * 2):
        theirs = (logprobs64, entropy64) if len(ours) == 2 else theirs
        for grad, grad64 in zip(gradients(leaves, *ours), gradients(leaves64, *theirs), strict=True):
            assert grad.dtype == dtype
            assert_close_to_fp64(grad, grad64, dtype, gradient=True)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("case", [case for case in reference.CASES if case != "banned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(backend_name, dtype, case, reduction, assert_close_to_fp64):
    inputs = reference.example_inputs(case, dtype=dtype)
    leaves64, logprobs64, _ = exact(inputs)
    count = max(int((inputs["labels"] != -100).sum()), 1)
    expected = {"mean": -logprobs64.sum() / count, "sum": -logprobs64.sum(), "none": -logprobs64}[reduction]
    inputs, leaves = with_leaves(inputs, dtype)
    loss = rk.linear_cross_entropy(**inputs, reduction=reduction, chunk_size=4)
    assert_close_to_fp64(loss, expected, torch.float32)
    for grad, grad64 in zip(gradients(leaves, 3 * loss), gradients(leaves64, 3 * expected), strict=True):
        assert grad.dtype == dtype
        assert_close_to_fp64(grad, grad64, dtype, scale=2, gradient=True)


def test_reference_spec_2_one_token(backend_name):
    """One token with p = 0.15 costs 1.90 nats."""
    head = torch.tensor([[math.log(0.15)], [math.log(0.85)]])
    loss = rk.linear_cross_entropy(torch.ones(1, 1), head, torch.tensor([0]))
    assert loss.item() == pytest.approx(1.90, abs=0.005)


def test_reference_independent(backend_name):
    """Against torch's own linear and cross_entropy, and autograd through them."""
    hidden, head, bias = normal(2, 5, 6), normal(11, 6, seed=1), normal(11, seed=2)
    labels = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))
    labels[0, 1] = -100
    leaves = [x.clone().requires_grad_() for x in (hidden, head, bias)]
    ours = rk.linear_cross_entropy(*leaves[:2], labels, bias=leaves[2])
    grads = torch.autograd.grad(ours, leaves)
    theirs = F.cross_entropy(F.linear(*leaves).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grads, torch.autograd.grad(theirs, leaves))


def ppo_inputs(dtype=torch.float32):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    hidden = torch.where(mask.unsqueeze(-1), normal(3, 5, 6), torch.nan)
    labels = torch.where(mask, torch.arange(15).view(3, 5) % 11, -100)
    old = torch.where(mask, -2.4 + 0.5 * normal(3, 5, seed=3), torch.nan)
    advantages = torch.where(mask, normal(3, 5, seed=4), torch.inf)
    tensors = [x.to(dtype).requires_grad_() for x in (hidden, normal(11, 6, seed=1), normal(11, seed=2))]
    return tensors, labels, old.to(dtype), advantages.to(dtype), mask


PPO_OPTIONS = {
    "plain": {},
    "all": {"cliprange": 0.1, "cliprange_high": 0.3, "dual_clip": 1.5, "entropy_coef": 0.05},
    "sequences": {"loss_agg_mode": "seq-mean-token-mean", "entropy_coef": 0.01},
    "norm": {"loss_agg_mode": "seq-mean-token-sum-norm", "num_items_in_batch": 7},
    "counted": {},  # with the number of items in a tensor
}


@pytest.mark.parametrize("options", PPO_OPTIONS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_ppo_is_ppo_loss_of_logprobs(backend_name, served, dtype, options):
    """Loss, metrics and gradients of ppo_loss(linear_logprobs(...)), with NaN under mask 0 everywhere."""
    served(dtype)
    (hidden, head, bias), labels, old, advantages, mask = ppo_inputs(dtype)
    options = {"num_items_in_batch": torch.tensor(20)} if options == "counted" else PPO_OPTIONS[options]
    leaves = [hidden, head, bias]
    fused = rk.linear_ppo_loss(
        hidden, head, labels, old, advantages, mask, bias=bias, temperature=0.9, chunk_size=4, **options
    )
    logprobs, entropy = rk.linear_logprobs(hidden, head, labels, bias=bias, temperature=0.9, return_entropy=True)
    accumulator = logprobs.dtype
    plain = rk.ppo_loss(logprobs, old.to(accumulator), advantages.to(accumulator), mask, entropy=entropy, **options)
    exact_sum = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(fused.loss, plain.loss, **exact_sum)
    torch.testing.assert_close(fused.policy_loss, plain.policy_loss.detach(), **exact_sum)
    assert fused.value_loss is None and fused.metrics.keys() == plain.metrics.keys()
    assert not any(x.requires_grad for x in (fused.policy_loss, *fused.metrics.values()))
    for name, value in plain.metrics.items():
        torch.testing.assert_close(fused.metrics[name], value, **exact_sum)
    tolerance = {"atol": 2e-3, "rtol": 2e-2} if dtype == torch.bfloat16 else exact_sum
    got, wanted = (torch.autograd.grad(1.7 * x.loss, leaves) for x in (fused, plain))
    torch.testing.assert_close(got, wanted, **tolerance)
    assert torch.equal(got[0][~mask], torch.zeros_like(got[0][~mask]))


def test_ppo_packed_with_rows(backend_name):
    """A flat batch, several first tokens reading one prompt row, equals the rectangular one."""
    (hidden, head, bias), labels, old, advantages, mask = ppo_inputs()
    wanted = rk.linear_ppo_loss(hidden, head, labels, old, advantages, mask, bias=bias, entropy_coef=0.1)
    rows = mask.flatten().nonzero().squeeze(-1)
    flat = [x.flatten()[rows] for x in (labels, old, advantages, mask)]
    store = torch.cat([hidden.flatten(0, 1), torch.full((2, 6), torch.nan)])
    packed = rk.linear_ppo_loss(store, head, *flat, rows=rows, bias=bias, entropy_coef=0.1)
    torch.testing.assert_close(packed.loss, wanted.loss)
    grads = [torch.autograd.grad(x.loss, (hidden, head, bias)) for x in (packed, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("direction", ("reverse", "forward"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl(backend_name, dtype, direction, assert_close_to_fp64):
    """Against the definition on float64 logits; the reference may have another width."""
    hidden, head, bias = normal(2, 4, 6), normal(11, 6, seed=1), normal(11, seed=2)
    ref_hidden, ref_head, ref_bias = normal(2, 4, 3, seed=3), normal(11, 3, seed=4), normal(11, seed=5)
    bias[3] = ref_bias[3] = -math.inf
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, head, bias)]
    constants = [x.to(dtype).requires_grad_() for x in (ref_hidden, ref_head, ref_bias)]
    options = {"temperature": 0.8, "direction": direction}
    kl = rk.linear_kl(*leaves[:2], *constants[:2], bias=leaves[2], ref_bias=constants[2], chunk_size=3, **options)
    leaves64 = [x.detach().double().requires_grad_() for x in leaves]
    kl64 = kl_divergence(F.linear(*leaves64), F.linear(*(x.detach().double() for x in constants)), **options)
    assert_close_to_fp64(kl, kl64, torch.float32)
    for grad, grad64 in zip(gradients(leaves, kl), gradients(leaves64, kl64), strict=True):
        assert_close_to_fp64(grad, grad64, dtype, scale=2, gradient=True)
    assert torch.autograd.grad(kl.sum(), constants, allow_unused=True) == (None, None, None)
    same = rk.linear_kl(leaves[0], leaves[1], leaves[0], leaves[1], softcap=5.0, direction=direction)
    assert torch.equal(same, torch.zeros(2, 4))


@pytest.mark.parametrize("direction", ("reverse", "forward"))
def test_kl_of_banned_entries_under_a_softcap(backend_name, direction, assert_close_to_fp64):
    """Entries that both sides ban, and softcap * tanh of the others: gradients as float64 autograd of the equations."""
    banned = torch.tensor([0, 3])
    leaves = [normal(5, 6).requires_grad_(), normal(11, 6, seed=1).requires_grad_()]
    others = [normal(5, 4, seed=2), normal(11, 4, seed=3)]
    bias = torch.zeros(11).index_fill(0, banned, -math.inf)
    kl = rk.linear_kl(*leaves, *others, bias=bias, ref_bias=bias, softcap=2.0, direction=direction)
    leaves64 = [x.detach().double().requires_grad_() for x in leaves]
    sides = [2.0 * torch.tanh((h @ w.t()) / 2.0) for h, w in (leaves64, [x.double() for x in others])]
    allowed = torch.ones(11, dtype=torch.bool).index_fill(0, banned, False)
    policy, ref = (x[:, allowed].log_softmax(-1) for x in sides)
    first, second = (policy, ref) if direction == "reverse" else (ref, policy)
    kl64 = (first.exp() * (first - second)).sum(-1)
    assert_close_to_fp64(kl, kl64, torch.float32)
    for grad, grad64 in zip(gradients(leaves, kl), gradients(leaves64, kl64), strict=True):
        assert_close_to_fp64(grad, grad64, torch.float32, scale=2)


def test_large_gradients_of_an_entropy_with_banned_entries(backend_name):
    """An impossible entry has no gradient, however large the entropy's is: as that of its log near certainty."""
    bias = torch.tensor([0.0, 0.0, -math.inf, 0.0])
    hidden = torch.zeros(2, 3).requires_grad_()
    weight = normal(4, 3).requires_grad_()
    entropy = rk.linear_logprobs(hidden, weight, torch.tensor([0, 1]), bias=bias, return_entropy=True)[1]
    found = torch.autograd.grad(entropy, (hidden, weight), torch.full((2,), 1e15))
    assert entropy.tolist() == pytest.approx([math.log(3)] * 2, rel=1e-6)  # the other logits are all 0
    assert found[0].abs().max() <= 1e15 * 1e-6 and torch.equal(found[1], torch.zeros(4, 3))


def test_gradcheck(backend_name, served):
    served(torch.float64)
    inputs, leaves = with_leaves(reference.example_inputs("rich", dtype=torch.float64), torch.float64)
    hidden, head, bias = leaves
    labels, ref_hidden, ref_head = inputs["labels"], hidden.detach().flip(0), head.detach().flip(0)
    options = {"temperature": inputs["temperature"], "softcap": 4.0, "chunk_size": 4}

    def logprobs(hidden, head, bias):
        return rk.linear_logprobs(hidden, head, labels, bias=bias, return_entropy=True, **options)

    def cross_entropy(hidden, head, bias):
        return rk.linear_cross_entropy(hidden, head, labels, bias=bias, **options)

    def kl(hidden, head, bias):
        return rk.linear_kl(hidden, head, ref_hidden, ref_head, bias=bias, softcap=4.0, chunk_size=4)

    for function in (logprobs, cross_entropy, kl):
        assert torch.autograd.gradcheck(function, (hidden, head, bias), fast_mode=True)


def test_frozen_parts(backend_name):
    """A frozen head or frozen hidden states get no gradient, and cost none."""
    hidden, head, labels = normal(4, 6), normal(11, 6, seed=1), torch.arange(4)
    for function in (rk.linear_logprobs, rk.linear_cross_entropy):
        both = [x.clone().requires_grad_() for x in (hidden, head)]
        function(*both, labels).sum().backward()
        for i in (0, 1):
            one = [x.clone().requires_grad_(j == i) for j, x in enumerate((hidden, head))]
            function(*one, labels).sum().backward()
            assert torch.equal(one[i].grad, both[i].grad) and one[1 - i].grad is None


def test_masked_garbage(backend_name):
    """Hidden states of ignored labels may be NaN, and their upstream gradient too."""
    hidden, head, labels = normal(5, 6), normal(11, 6, seed=1), torch.tensor([1, -100, 3, -100, 5])
    dirty = hidden.clone()
    dirty[1], dirty[3] = math.nan, math.inf
    upstream = torch.tensor([1.0, math.nan, -2.0, math.inf, 0.5])
    results = []
    for x in (hidden, dirty):
        leaves = [x.clone().requires_grad_(), head.clone().requires_grad_()]
        logprobs, entropy = rk.linear_logprobs(*leaves, labels, return_entropy=True)
        torch.autograd.backward((logprobs, entropy), (upstream, upstream))
        loss = rk.linear_cross_entropy(*leaves, labels)
        results.append((logprobs, entropy, loss, *(leaf.grad for leaf in leaves), *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[1][0][[1, 3]], torch.zeros(2)) and torch.equal(results[1][1][[1, 3]], torch.zeros(2))
    assert torch.equal(results[1][3][[1, 3]], torch.zeros(2, 6))


def test_garbage_in_a_row_that_counts(backend_name):
    """NaN hidden states are NaN log-probs, of their row alone."""
    hidden = normal(3, 6)
    hidden[1] = math.nan
    for x in rk.linear_logprobs(hidden, normal(11, 6, seed=1), torch.tensor([1, 2, 3]), return_entropy=True):
        assert x.isnan().tolist() == [False, True, False]


def test_edges(backend_name):
    hidden, head = normal(3, 6).requires_grad_(), normal(11, 6, seed=1).requires_grad_()
    nothing = torch.full((3,), -100)
    loss = rk.linear_cross_entropy(hidden, head, nothing)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not head.grad.any()
    empty = rk.linear_logprobs(hidden[:0], head, nothing[:0])
    empty.sum().backward()
    assert empty.shape == (0,) and not head.grad.any()
    banned = torch.full((11,), -math.inf, requires_grad=True)
    logprobs, entropy = rk.linear_logprobs(hidden, head, torch.arange(3), bias=banned, return_entropy=True)
    logprobs.sum().backward()
    assert torch.equal(logprobs, torch.full((3,), -math.inf)) and not entropy.any()
    assert not (hidden.grad.any() or head.grad.any() or banned.grad.any())
    sliced = normal(4, 7, 12)[:, :-1, ::2]
    labels = torch.arange(24).view(4, 6) % 11
    torch.testing.assert_close(
        rk.linear_logprobs(sliced, head, labels), rk.linear_logprobs(sliced.contiguous(), head, labels)
    )
    torch.testing.assert_close(
        rk.linear_logprobs(hidden, normal(6, 11).t(), torch.arange(3)),
        rk.logprobs_from_logits(hidden @ normal(6, 11), torch.arange(3)),
    )


@pytest.mark.parametrize("case", reference.CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_chunks(isa, dtype, case, assert_close_to_fp64, monkeypatch):
    """Chunks of 5 columns and 4 tokens: rows whose statistics, labels and gradients come from several chunks."""
    monkeypatch.setattr(_linear_walk, "NARROW", 5)
    monkeypatch.setattr(_linear_walk, "TOKENS", 4)
    inputs = reference.example_inputs(case, dtype=dtype)
    leaves64, logprobs64, entropy64 = exact(inputs)
    inputs, leaves = with_leaves(inputs, dtype)
    outputs = rk.linear_logprobs(**inputs, return_entropy=True)
    assert_close_to_fp64(outputs[0], logprobs64, torch.float32)
    assert_close_to_fp64(outputs[1], entropy64, torch.float32)
    for grad, grad64 in zip(gradients(leaves, *outputs), gradients(leaves64, logprobs64, entropy64), strict=True):
        assert_close_to_fp64(grad, grad64, dtype, gradient=True)
    loss = rk.linear_cross_entropy(**inputs, reduction="sum", chunk_size=3)
    if logprobs64.isfinite().all():
        assert_close_to_fp64(loss, -logprobs64.sum(), torch.float32, scale=4)
        for grad, grad64 in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(-logprobs64.sum(), leaves64)):
            assert_close_to_fp64(grad, grad64, dtype, gradient=True)


def test_wide_head_is_widened_in_blocks(backend_name, assert_close_to_fp64, monkeypatch):
    monkeypatch.setattr(_head, "UPCAST_BLOCK", 5)
    inputs = reference.example_inputs("masked", dtype=torch.bfloat16)
    leaves64, logprobs64, entropy64 = exact(inputs)
    inputs, leaves = with_leaves(inputs, torch.bfloat16)
    outputs = rk.linear_logprobs(**inputs, return_entropy=True)
    assert_close_to_fp64(outputs[0], logprobs64, torch.float32)
    for grad, grad64 in zip(gradients(leaves, *outputs), gradients(leaves64, logprobs64, entropy64)):
        assert_close_to_fp64(grad, grad64, torch.bfloat16, gradient=True)


def test_bad_input(backend_name, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_CHECK", "1")
    hidden, head, labels = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)
    bad = [
        ({"weight": torch.zeros(5, 3)}, "weight has shape [5, 3], expected [*, 4]"),
        ({"weight": torch.zeros(0, 4)}, "weight has shape [0, 4], expected [V, H] with V >= 1"),
        (
            {"weight": head.double()},
            "weight has dtype torch.float64, hidden_states torch.float32; expected float64 for",
        ),
        ({"precision": "tf32"}, "precision must be one of 'exact', 'fast', got 'tf32'"),
        ({"labels": labels[:1]}, "labels has shape [1], expected [2]"),
        ({"labels": labels.float()}, "labels has dtype float32"),
        ({"labels": torch.tensor([0, 5])}, "labels holds 5 at position [1], expected values in [0, 5)"),
        ({"rows": torch.tensor([0, 2])}, "rows holds values outside [0, 2)"),
        ({"rows": torch.tensor([0])}, "rows has shape [1], expected [2]"),
        ({"hidden_states": hidden[None], "rows": labels}, "expected [N, H] to go with rows"),
        ({"bias": torch.zeros(4)}, "bias has shape [4], expected [5]"),
        ({"temperature": 0}, "temperature must be a number > 0.0 and < inf, got 0"),
        ({"temperature": torch.ones(3)}, "temperature has shape [3], expected [2]"),
        ({"temperature": torch.tensor([1.0, 0.0])}, "temperature holds 0.0, expected numbers > 0 and finite"),
        ({"softcap": 0.0}, "softcap must be a number > 0.0 and < inf, got 0.0"),
        ({"chunk_size": 0}, "chunk_size must be a number >= 1, got 0"),
        ({"vocab_start_index": 5}, "vocab_start_index is 5, expected 0 when process_group is None"),
        ({"hidden_states": hidden.to("meta")}, f"weight is on {head.device}, expected meta"),
    ]
    for change, message in bad:
        for function in (rk.linear_logprobs, rk.linear_cross_entropy):
            with pytest.raises(ValueError) as error:
                function(**{"hidden_states": hidden, "weight": head, "labels": labels, **change})
            assert message in str(error.value)


def test_bad_input_of_losses(backend_name):
    hidden, head, labels = torch.zeros(1, 2, 4), torch.zeros(5, 4), torch.zeros(1, 2, dtype=torch.int64)
    numbers, mask = torch.zeros(1, 2), torch.ones(1, 2).bool()
    ppo = (hidden, head, labels, numbers, numbers, mask)
    flat = tuple(x if x is head else x.flatten(0, 1) for x in ppo)
    bad = [
        (lambda: rk.linear_cross_entropy(hidden, head, labels, reduction="avg"), "reduction must be one of 'mean'"),
        (lambda: rk.linear_cross_entropy(hidden, head, labels, num_items_in_batch=0), "num_items_in_batch must be"),
        (
            lambda: rk.linear_cross_entropy(hidden, head, labels, reduction="sum", num_items_in_batch=3),
            "num_items_in_batch needs reduction='mean', got reduction='sum'",
        ),
        (lambda: rk.linear_ppo_loss(*ppo[:3], numbers[:, :1], *ppo[4:]), "old_log_probs has shape [1, 1], expected"),
        (lambda: rk.linear_ppo_loss(*ppo[:5], numbers), "response_mask has dtype float32, expected bool"),
        (lambda: rk.linear_ppo_loss(*ppo, cliprange=-1), "cliprange must be a number >= 0"),
        (lambda: rk.linear_ppo_loss(*ppo, loss_agg_mode="mean"), "loss_agg_mode must be one of"),
        (lambda: rk.linear_ppo_loss(*flat, loss_agg_mode="seq-mean-token-sum"), "labels has shape [2], expected [B, T"),
        (lambda: rk.linear_kl(hidden, head, hidden, head[:4]), "ref_weight has shape [4, 4], expected [5, *]"),
        (lambda: rk.linear_kl(hidden, head, hidden[0], head), "ref_hidden_states has shape [2, 4], expected [1, 2, 4]"),
        (lambda: rk.linear_kl(hidden, head, hidden, head, direction=1), "direction must be one of 'reverse'"),
    ]  # fmt: skip
    for call, message in bad:
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)


def test_out_of_range_without_check(backend_name, monkeypatch):
    """Where labels and rows may not be read, as on a GPU, such entries become NaN, and no other."""
    for module in (logprobs_module, ops):
        monkeypatch.setattr(module, "reads_values", lambda tensor: False)
    hidden, head = normal(3, 6).requires_grad_(), normal(11, 6, seed=1).requires_grad_()
    labels, rows = torch.tensor([1, 11, 2, 3, -1]), torch.tensor([0, 1, 2, 3, 0])
    logprobs, entropy = rk.linear_logprobs(hidden, head, labels, rows=rows, return_entropy=True)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False, True, True]
    assert rk.linear_cross_entropy(hidden, head, labels, rows=rows).isnan()
    of_rows = torch.tensor([1, 11, -1])  # without `rows` a CPU may take another way
    assert rk.linear_logprobs(hidden, head, of_rows).isnan().tolist() == [False, True, True]
    assert rk.linear_cross_entropy(hidden, head, of_rows).isnan()
    logprobs[:2].sum().backward()
    assert hidden.grad[1].isnan().all() and head.grad.isnan().all()


def test_opcheck(backend_name):
    hidden, head, bias = (x.requires_grad_() for x in (normal(5, 4), normal(7, 4, seed=1), normal(7, seed=2)))
    labels, rows, warm = torch.tensor([1, 0, -100]), torch.tensor([4, 4, 0]), torch.tensor([0.5, 1.0, 2.0])
    low, up = normal(5, 2, seed=3).requires_grad_(), normal(7, 2, seed=4).requires_grad_()
    inputs = (hidden, head, labels, rows, bias, warm, low, up)
    torch.library.opcheck(ops.linear_logprobs_fwd, (*inputs, 1.0, 3.0, -100, True, False, 2, False, "", 0))
    old, mask = torch.full((1, 3), -2.0), torch.tensor([[True, True, False]])
    ppo = (hidden, head, labels[None], *inputs[3:], old, old, mask, None, 1.0, None, 0.2, 0.2, None, 0.1)
    torch.library.opcheck(ops.linear_ppo_fwd, (*ppo, "token-mean", 2, False, "", 0, [True] * 5))
    plain = (hidden[:3], head, labels, *(None,) * 5)
    torch.library.opcheck(ops.linear_logprobs_fwd, (*plain, 1.0, None, -100, False, False, 2, False, "", 0))
    torch.library.opcheck(
        ops.linear_kl_fwd,
        (hidden, head, hidden.detach(), head.detach(), None, bias, None, 0.7, None, True, False, 2, False, ""),
    )


def test_compile(backend_name):
    def loss(hidden, head, labels, mask):
        logprobs, entropy = rk.linear_logprobs(hidden, head, labels, return_entropy=True)
        ppo = rk.linear_ppo_loss(hidden, head, labels, logprobs.detach(), entropy.detach(), mask, entropy_coef=0.1)
        kl = rk.linear_kl(hidden, head, hidden.detach().flip(0), head.detach())
        cross_entropy = rk.linear_cross_entropy(hidden, head, labels.clamp(min=2))
        return logprobs.sum() - entropy.mean() + ppo.loss + kl.sum() + cross_entropy + ppo.metrics["entropy"]

    hidden, head = normal(2, 3, 4).requires_grad_(), normal(7, 4, seed=1).requires_grad_()
    labels, mask = torch.tensor([[0, 1, 2], [3, 4, 6]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, loss):
        value = function(hidden, head, labels, mask)
        results.append((value.detach(), *torch.autograd.grad(value, (hidden, head))))
    torch.testing.assert_close(*results)


def test_same_answer(backend_name):
    """Same bits on every run; chunks of one size give a row the same bits whatever its neighbours hold."""
    inputs, leaves = with_leaves(reference.example_inputs("rows", dtype=torch.bfloat16), torch.bfloat16)
    runs = []
    for _ in range(2):
        logprobs = rk.linear_logprobs(**inputs)
        runs.append((logprobs, *gradients(leaves, logprobs), rk.linear_cross_entropy(**inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    hidden, head, labels = normal(6, 8), normal(11, 8, seed=1), torch.arange(6)
    changed = torch.cat([hidden[:2], 100 * hidden[2:]])
    assert torch.equal(rk.linear_logprobs(hidden, head, labels)[:2], rk.linear_logprobs(changed, head, labels)[:2])


def test_citizen(backend_name):
    """retain_graph, one hidden tensor read twice, no_grad, a loss of many losses."""
    hidden, head, labels = normal(4, 6).requires_grad_(), normal(11, 6, seed=1).requires_grad_(), torch.arange(4)
    for function in (rk.linear_logprobs, rk.linear_cross_entropy):
        once = function(hidden, head, labels).sum()
        first = torch.autograd.grad(once, (hidden, head), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(once, (hidden, head))))
        twice = function(hidden, head, labels).sum() + 2 * function(hidden, head, labels).sum()
        torch.testing.assert_close(torch.autograd.grad(twice, (hidden, head)), tuple(3 * g for g in first))
        with torch.no_grad():
            assert not function(hidden, head, labels).requires_grad
