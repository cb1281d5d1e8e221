"""A LoRA layer on the LM head: logits = hidden weight^T + scaling (hidden A^T) B^T + bias, without weight + B A."""

import math

import pytest
import torch
import torch.nn.functional as F

import rlhf_kernels as rk
from rlhf_kernels import _linear_walk
from rlhf_kernels.reference import linear as reference

OP = "linear"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALING, RANK = 0.7, 3


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(case, dtype):
    """(inputs without hidden states, weight and bias; those, A and B) of a case of the op, some hidden states NaN."""
    inputs = reference.example_inputs(case, dtype=dtype)
    leaves = {name: inputs.pop(name) for name in ("hidden_states", "weight", "bias") if name in inputs}
    vocab, width = leaves["weight"].shape
    leaves["a"] = normal(RANK, width, dtype=dtype, seed=5).to(leaves["weight"].device)
    leaves["b"] = normal(vocab, RANK, dtype=dtype, seed=6).to(leaves["weight"].device)
    return inputs, leaves


def trained(leaves, dtype, names=None):
    """Copies in this dtype, of which all or these require grad."""
    return {k: x.detach().to(dtype, copy=True).requires_grad_(names is None or k in names) for k, x in leaves.items()}


def arguments(leaves):
    """What the functions take: the leaves, with A and B as `lora`."""
    leaves = dict(leaves)
    lora = leaves.pop("a"), leaves.pop("b"), SCALING
    return {**leaves, "lora": lora}


def exact_logits(leaves, labels, rows=None, temperature=1.0, softcap=None):
    """z [M, V] in float64 with the head's weight made as a whole; hidden states of ignored labels count as 0."""
    h = leaves["hidden_states"] if rows is None else leaves["hidden_states"][rows]
    h = torch.where((labels != -100).unsqueeze(-1), h, 0.0)
    z = h @ (leaves["weight"] + SCALING * leaves["b"] @ leaves["a"]).t() + leaves.get("bias", 0.0)
    z = z if softcap is None else torch.where(z == -math.inf, z, softcap * torch.tanh(z / softcap))
    return z / (temperature.double().unsqueeze(-1) if torch.is_tensor(temperature) else temperature)


def exact(leaves, inputs):
    """(log-probs, entropy) by log_softmax, 0 where the label is ignored."""
    kept = inputs["labels"] != -100
    log_p = F.log_softmax(exact_logits(leaves, **inputs), -1)
    finite = torch.where(log_p == -math.inf, 0.0, log_p)
    entropy = -torch.where(log_p == -math.inf, 0.0, finite.exp() * finite).sum(-1)
    picked = log_p.gather(-1, inputs["labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(kept, picked, 0.0), torch.where(kept, entropy, 0.0)


def gradients(leaves, *outputs):
    """{name: gradient} of one fixed weighted sum of the finite outputs, for the leaves that require grad."""
    total = 0.0
    for x in outputs:
        weights = torch.linspace(-1.0, 2.0, x.numel(), dtype=torch.float64).view(x.shape)
        total = total + (torch.where(torch.isfinite(x), x, 0.0) * weights.to(x)).sum()
    wanted = {k: x for k, x in leaves.items() if x.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values()), retain_graph=True)))


def compare(outputs, leaves, outputs64, leaves64, dtype, assert_close_to_fp64):
    for x, x64 in zip(outputs, outputs64, strict=True):
        assert_close_to_fp64(x, x64, torch.float64 if dtype == torch.float64 else torch.float32)
    grads, grads64 = gradients(leaves, *outputs), gradients(leaves64, *outputs64)
    assert grads.keys() == grads64.keys()
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert_close_to_fp64(grad, grads64[name], dtype, scale=2, gradient=True)


TRAINED = {
    "all": None,
    "adapter": ("hidden_states", "a", "b"),
    "adapter alone": ("a", "b"),
    "b": ("b",),
    "a": ("hidden_states", "a"),
    "hidden states": ("hidden_states",),
}


@pytest.mark.parametrize("chunk_size", (None, 2))
@pytest.mark.parametrize("case", [case for case in reference.CASES if case != "small"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_and_entropy(backend_name, dtype, case, chunk_size, assert_close_to_fp64):
    inputs, leaves = problem(case, dtype)
    leaves64, leaves = trained(leaves, torch.float64), trained(leaves, dtype)
    outputs = rk.linear_logprobs(**inputs, **arguments(leaves), return_entropy=True, chunk_size=chunk_size)
    compare(outputs, leaves, exact(leaves64, inputs), leaves64, dtype, assert_close_to_fp64)


@pytest.mark.parametrize("names", TRAINED)
@pytest.mark.parametrize("case", ("masked", "rows", "rich"))
def test_each_combination_of_what_is_trained(backend_name, case, names, assert_close_to_fp64):
    inputs, leaves = problem(case, torch.float32)
    leaves64, leaves = (trained(leaves, dtype, TRAINED[names]) for dtype in (torch.float64, torch.float32))
    outputs = (rk.linear_logprobs(**inputs, **arguments(leaves)),)
    compare(outputs, leaves, exact(leaves64, inputs)[:1], leaves64, torch.float32, assert_close_to_fp64)
    loss = rk.linear_cross_entropy(**inputs, **arguments(leaves), reduction="sum", chunk_size=2)
    outputs64 = (-exact(leaves64, inputs)[0].sum(),)
    compare((loss,), leaves, outputs64, leaves64, torch.float32, assert_close_to_fp64)


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("case", ("masked", "rows", "rich", "empty"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_with_smoothing(backend_name, dtype, case, reduction, assert_close_to_fp64):
    inputs, leaves = problem(case, dtype)
    leaves64, leaves = trained(leaves, torch.float64), trained(leaves, dtype)
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": reduction}
    loss = rk.linear_cross_entropy(**inputs, **arguments(leaves), **options)
    z, kept = exact_logits(leaves64, **inputs), inputs["labels"] != -100
    each = F.cross_entropy(z, inputs["labels"], label_smoothing=0.1, reduction="none")
    each = each + 0.01 * torch.where(kept, z.logsumexp(-1).square(), 0.0)
    wanted = each if reduction == "none" else each.sum() / max(int(kept.sum()), 1)
    compare((loss,), leaves, (wanted,), leaves64, dtype, assert_close_to_fp64)


@pytest.mark.parametrize("function", ("ppo", "policy", "selecting"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_policy_losses(backend_name, served, dtype, function, assert_close_to_fp64):
    """Against the losses of float64 log-probs and entropies of the whole logits, with NaN under mask 0."""
    served(dtype)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    labels = torch.where(mask, torch.arange(15).view(3, 5) % 11, -100)
    old = torch.where(mask, -2.4 + 0.5 * normal(3, 5, seed=3), torch.nan)
    advantages = torch.where(mask, normal(3, 5, seed=4), torch.inf)
    leaves = {"hidden_states": torch.where(mask.unsqueeze(-1), normal(3, 5, 6), torch.nan), "weight": normal(11, 6)}
    leaves |= {"a": normal(2, 6, seed=5), "b": normal(11, 2, seed=6)}
    leaves = trained(leaves, dtype, ("hidden_states", "a", "b"))
    leaves64 = trained(leaves, torch.float64, ("hidden_states", "a", "b"))
    options = {"entropy_coef": 0.1}
    if function != "ppo":
        options["objective"] = rk.KLCov(ratio=0.3) if function == "selecting" else rk.GSPO()
    ours, theirs = (rk.linear_ppo_loss, rk.ppo_loss) if function == "ppo" else (rk.linear_policy_loss, rk.policy_loss)
    loss = ours(labels=labels, old_log_probs=old, advantages=advantages, response_mask=mask, **arguments(leaves),
                **options).loss  # fmt: skip
    log_probs, entropy = exact(leaves64, {"labels": labels})
    with rk.backend("reference"):
        loss64 = theirs(log_probs, old.double(), advantages.double(), mask, entropy=entropy, **options).loss
        compare((loss,), leaves, (loss64,), leaves64, dtype, assert_close_to_fp64)


def test_preference_loss(backend_name, assert_close_to_fp64):
    labels = torch.tensor([[-100, 1, 2], [-100, 3, -100]])
    leaves = {"hidden_states": normal(2, 3, 6), "weight": normal(5, 6), "a": normal(2, 6), "b": normal(5, 2)}
    leaves, leaves64 = (trained(leaves, dtype, ("hidden_states", "a", "b")) for dtype in (torch.float32, torch.float64))
    ref = torch.tensor([-4.0, -1.0])
    loss = rk.linear_preference_loss(labels=labels, ref_log_probs=ref, **arguments(leaves)).loss
    sums = exact(leaves64, {"labels": labels})[0].sum(1)
    wanted = -F.logsigmoid(0.1 * ((sums[0] - ref[0]) - (sums[1] - ref[1])))
    compare((loss,), leaves, (wanted,), leaves64, torch.float32, assert_close_to_fp64)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_kept_logprobs(dtype, assert_close_to_fp64):
    """Rows that keep nothing, and ignored ones, may hold NaN."""
    labels = torch.tensor([3, 0, -100, 6, 1])
    kept = torch.tensor([[3, 1, 5], [0, 2, -1], [1, 2, 3], [6, -1, -1], [-1, -1, -1]])
    hidden = normal(5, 4)
    hidden[[2, 4]] = math.nan
    leaves = {"hidden_states": hidden, "weight": normal(7, 4), "a": normal(2, 4, seed=5), "b": normal(7, 2, seed=6)}
    leaves = trained(leaves, dtype)
    leaves64 = trained(leaves, torch.float64)
    found = rk.linear_kept_logprobs(labels=labels, kept=kept, **arguments(leaves))
    counts = torch.tensor([True, True, False, True, False])
    z = exact_logits(leaves64, torch.where(counts, labels, -100))
    allowed = torch.zeros(5, 8, dtype=torch.bool).scatter(1, kept % 8, True)[:, :7]
    log_p = torch.where(allowed, z, -math.inf)[counts].log_softmax(-1)
    picked = log_p.gather(-1, labels[counts].unsqueeze(-1)).squeeze(-1)
    wanted = torch.tensor([0.0, 0.0, 0.0, 0.0, -math.inf], dtype=torch.float64).index_put(
        (counts.nonzero()[:, 0],), picked
    )
    compare((found,), leaves, (wanted,), leaves64, dtype, assert_close_to_fp64)


def test_gradcheck(backend_name, served):
    served(torch.float64)
    inputs, leaves = problem("rich", torch.float64)
    leaves = trained(leaves, torch.float64)

    def log_probs(*values):
        return rk.linear_logprobs(**inputs, **arguments(dict(zip(leaves, values))), return_entropy=True, chunk_size=4)

    def cross_entropy(*values):
        return rk.linear_cross_entropy(**inputs, **arguments(dict(zip(leaves, values))), chunk_size=4)

    for function in (log_probs, cross_entropy):
        assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("case", ("masked", "rows", "rich"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_chunks(isa, dtype, case, assert_close_to_fp64, monkeypatch):
    """Chunks of 5 columns and 4 tokens: d low comes from several of the former, d B from several of the latter."""
    monkeypatch.setattr(_linear_walk, "NARROW", 5)
    monkeypatch.setattr(_linear_walk, "TOKENS", 4)
    inputs, leaves = problem(case, dtype)
    leaves64, leaves = trained(leaves, torch.float64), trained(leaves, dtype)
    outputs = rk.linear_logprobs(**inputs, **arguments(leaves), return_entropy=True)
    compare(outputs, leaves, exact(leaves64, inputs), leaves64, dtype, assert_close_to_fp64)


def test_nothing_of_ignored_rows_reaches_the_adapter(backend_name):
    """Not their hidden states and not their upstream gradient; a row that any label reads counts."""
    rows, labels = torch.tensor([0, 1, 1, 2, 3]), torch.tensor([1, -100, 4, -100, 2])
    hidden, head, a, b = normal(5, 6), normal(11, 6, seed=1), normal(2, 6, seed=2), normal(11, 2, seed=3)
    dirty = hidden.clone()
    dirty[2], dirty[4] = math.nan, math.inf
    upstream = torch.tensor([1.0, math.nan, -2.0, math.inf, 0.5])
    results = []
    for x in (hidden, dirty):
        leaves = [y.clone().requires_grad_() for y in (x, a, b)]
        log_probs = rk.linear_logprobs(leaves[0], head, labels, rows=rows, lora=(*leaves[1:], 2.0))
        log_probs.backward(upstream)
        loss = rk.linear_cross_entropy(leaves[0], head, labels, rows=rows, lora=(*leaves[1:], 2.0))
        results.append((log_probs, loss, *(y.grad for y in leaves), *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert all(x.isfinite().all() for x in results[1])
    assert not results[1][2][[2, 4]].any() and results[1][2][[0, 1, 3]].any(1).all()


def test_a_row_that_counts_twice_is_read_twice(backend_name, assert_close_to_fp64):
    """With rows the gradient of A is that of the gathered hidden states."""
    inputs, leaves = problem("rows", torch.float32)
    leaves64, leaves = trained(leaves, torch.float64), trained(leaves, torch.float32)
    found = gradients(leaves, rk.linear_logprobs(**inputs, **arguments(leaves)))
    rows = inputs.pop("rows")
    gathered = {**leaves64, "hidden_states": leaves64["hidden_states"][rows]}
    wanted = gradients(leaves64, exact(gathered, inputs)[0])
    assert_close_to_fp64(found["a"], wanted["a"], torch.float32, scale=2)


def test_without_an_adapter_of_effect(backend_name):
    """B = 0, as adapters begin: the log-probs of the plain head, a gradient for B and none for A."""
    hidden, head, labels = normal(4, 6), normal(11, 6, seed=1), torch.arange(4)
    a, b = normal(2, 6, seed=2).requires_grad_(), torch.zeros(11, 2, requires_grad=True)
    log_probs = rk.linear_logprobs(hidden, head, labels, lora=(a, b, 2.0))
    assert torch.equal(log_probs, rk.linear_logprobs(hidden, head, labels))
    log_probs.sum().backward()
    assert not a.grad.any() and b.grad.any()


def test_dtypes_that_differ(backend_name, assert_close_to_fp64):
    """peft keeps its adapters in fp32 on a bf16 model; autocast leaves them so."""
    inputs, leaves = problem("masked", torch.bfloat16)
    names = ("hidden_states", "a", "b")
    leaves = {k: x.float() if k in ("a", "b") else x for k, x in leaves.items()}
    leaves["a"] *= 1.001  # no longer bf16
    leaves64 = trained(leaves, torch.float64, names)
    leaves = {k: x.clone().requires_grad_(k in names) for k, x in leaves.items()}
    found = rk.linear_logprobs(**inputs, **arguments(leaves))
    wanted = exact(leaves64, inputs)[0]
    assert_close_to_fp64(found, wanted, torch.float32)
    for (name, grad), grad64 in zip(gradients(leaves, found).items(), gradients(leaves64, wanted).values()):
        assert grad.dtype == leaves[name].dtype
        rounded = torch.bfloat16 if backend_name == "triton" else grad.dtype  # as d/dlogits is
        assert_close_to_fp64(grad, grad64, rounded, scale=2, gradient=True)
    wide = {k: x.detach().float().requires_grad_(k in names) for k, x in leaves.items()}
    with torch.autocast(found.device.type, dtype=torch.bfloat16):
        assert torch.equal(rk.linear_logprobs(**inputs, **arguments(wide)), found)


@pytest.mark.parametrize("trained_head", (True, False))
def test_compile(backend_name, trained_head):
    def loss(hidden, head, a, b, labels, rows):
        options = {"rows": rows, "lora": (a, b, 0.5)}
        each = rk.linear_logprobs(hidden, head, labels, **options)
        return each.sum() + rk.linear_cross_entropy(hidden, head, labels, **options)

    labels, rows = torch.tensor([1, -100, 3, 6, 2]), torch.tensor([0, 1, 2, 2, 2])
    head = normal(7, 4, seed=1).requires_grad_(trained_head)
    inputs = [normal(3, 4).requires_grad_(), head]
    inputs += [normal(2, 4, seed=2).requires_grad_(), normal(7, 2, seed=3).requires_grad_()]
    results = []
    for function in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
        value = function(*inputs, labels, rows)
        results.append((value.detach(), *torch.autograd.grad(value, [x for x in inputs if x.requires_grad])))
    torch.testing.assert_close(*results)


def largest_allocation(monkeypatch, function):
    """Bytes of the largest piece of memory that PyTorch, or the cpu backend of its own, takes for one call."""
    from rlhf_kernels import _native
    from rlhf_kernels.cpu import linear

    sizes = []
    monkeypatch.setattr(linear, "fresh", lambda *shape: sizes.append(4 * math.prod(shape)) or _native.fresh(*shape))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max([event.self_cpu_memory_usage for event in profile.events()] + sizes)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_no_matrix_of_the_size_of_the_head(backend_name, dtype, monkeypatch):
    """Forward and backward of a frozen head never take memory for [V, H] numbers; a trained one's gradient does."""
    if torch.cuda.is_available():
        pytest.skip("the profile is of memory on the CPU")
    if (backend_name, dtype) == ("triton", torch.bfloat16):
        pytest.skip("without a GPU the factors of its products are widened, each whole")
    hidden, head = normal(8, 512, dtype=dtype).requires_grad_(), normal(9000, 512, dtype=dtype, seed=1)
    a, b = normal(4, 512, dtype=dtype).requires_grad_(), normal(9000, 4, dtype=dtype).requires_grad_()
    labels = torch.arange(8)

    def step():
        log_probs = rk.linear_logprobs(hidden, head, labels, lora=(a, b, 0.5))
        (log_probs.sum() + rk.linear_cross_entropy(hidden, head, labels, lora=(a, b, 0.5))).backward()

    # a head in bf16 is widened 4096 rows at a time
    whole = head.numel() * 4
    assert largest_allocation(monkeypatch, step) < 0.5 * whole
    head.requires_grad_()
    assert largest_allocation(monkeypatch, step) >= whole


def test_bad_input(backend_name):
    hidden, head, labels = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)
    a, b = torch.zeros(3, 4), torch.zeros(5, 3)
    bad = [
        (a, "lora must be (A, B, scaling), got Tensor"),
        ((a, b), "lora must be (A, B, scaling), got tuple of 2"),
        ((a[:, :3], b, 1.0), "lora[0] has shape [3, 3], expected [*, 4] (A [r, H], H as in hidden_states)"),
        ((a[:0], b[:, :0], 1.0), "lora[0] has shape [0, 4], expected A [r, H] with r >= 1"),
        ((a, b.t(), 1.0), "lora[1] has shape [3, 5], expected [5, 3] (B [V, r], V as in weight, r as in lora[0])"),
        ((a.long(), b, 1.0), "lora[0] has dtype int64, expected one of"),
        ((a, b.double(), 1.0), "lora[1] has dtype torch.float64, hidden_states torch.float32; expected float64"),
        ((a, b, math.inf), "lora[2] must be a number > -inf and < inf, got inf"),
        ((a, b, torch.ones(())), "lora[2] must be a number"),
        ((a.to("meta"), b, 1.0), "lora[0] is on meta, expected"),
    ]
    for lora, message in bad:
        for function in (rk.linear_logprobs, rk.linear_cross_entropy):
            with pytest.raises(ValueError) as error:
                function(hidden, head, labels, lora=lora)
            assert message in str(error.value)
    sharded = type("DTensor", (torch.Tensor,), {"device_mesh": None, "placements": ("Shard(dim=0)",)})
    with pytest.raises(ValueError, match=r"lora\[1\] is a DTensor with placements \['Shard\(dim=0\)'\]"):
        rk.linear_logprobs(hidden, head, labels, lora=(a, b.as_subclass(sharded), 1.0))
