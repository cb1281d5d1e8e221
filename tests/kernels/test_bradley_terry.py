"""bradley_terry_loss and plackett_luce_loss: the seven questions, SPEC section 2 (1, 5, 6, 7) and traps 4, 5."""

import itertools
import math

import pytest
import torch

from rlhf_kernels import bradley_terry_loss, dispatch, plackett_luce_loss
from rlhf_kernels.cpu import bradley_terry as native
from rlhf_kernels.reference import bradley_terry as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPEC_SCORES = [1.8, 0.9, 0.3, -0.5]


def served(dtype, op="bradley_terry"):
    """Skip where the chosen backend says that it does not take this dtype."""
    try:
        dispatch.pick(op, torch.zeros(1, dtype=dtype))
    except RuntimeError as error:
        pytest.skip(str(error))


def public(inputs, scores=None, **options):
    """bradley_terry_loss on example_inputs."""
    scores = inputs["scores"] if scores is None else scores
    ties = "half" if inputs["ties_half"] else "drop"
    arguments = {"margins": inputs["margins"], "ties": ties, **options}
    return bradley_terry_loss(scores, inputs["ranks"], inputs["cu_groups"], **arguments)


def in_fp64(inputs):
    double = {"scores": inputs["scores"].double(), "margins": None}
    if inputs["margins"] is not None:
        double["margins"] = inputs["margins"].double()
    return {**inputs, **double}


def loop_bradley_terry(scores, ranks):
    """One prompt in plain Python: (losses of its pairs, right pairs)."""
    losses, right = [], 0.0
    for (s_i, r_i), (s_j, r_j) in itertools.permutations(list(zip(scores, ranks, strict=True)), 2):
        if 0 <= r_i < r_j:
            losses.append(-math.log(1 / (1 + math.exp(s_j - s_i))))
            right += 1.0 if s_i > s_j else 0.5 if s_i == s_j else 0.0
    return losses, right


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", reference.CASES)
def test_values(backend_name, dtype, case, assert_close_to_fp64):
    served(dtype)
    inputs = reference.example_inputs(case, dtype=dtype)
    double = in_fp64(inputs)
    assert_close_to_fp64(public(inputs, reduction="none").loss, reference.bradley_terry(**double), dtype)
    order = {name: inputs[name] for name in ("scores", "ranks", "cu_groups")}
    expected = reference.plackett_luce(*(double[name] for name in order))
    assert_close_to_fp64(plackett_luce_loss(**order, reduction="none").loss, expected, dtype)


def test_reference(backend_name):
    """Against a loop in plain Python; Plackett-Luce against the product of its choices' probabilities."""
    inputs = reference.example_inputs("absent", dtype=torch.float32, seed=3)
    cu, scores, ranks = inputs["cu_groups"].tolist(), inputs["scores"].tolist(), inputs["ranks"].tolist()
    prompts = [loop_bradley_terry(scores[a:b], ranks[a:b]) for a, b in itertools.pairwise(cu)]
    counted = [losses for losses, _ in prompts if losses]
    result = bradley_terry_loss(inputs["scores"], inputs["ranks"], inputs["cu_groups"])
    assert result.loss.item() == pytest.approx(sum(sum(x) / len(x) for x in counted) / len(counted), rel=1e-5)
    assert result.metrics["pairs"].item() == sum(map(len, counted))
    right = sum(right for _, right in prompts)
    assert result.metrics["accuracy"].item() == pytest.approx(right / sum(map(len, counted)))
    present = [s for s, r in zip(scores, ranks, strict=True) if r >= 0]
    assert result.metrics["min_reward"].item() == pytest.approx(min(present))
    assert result.metrics["max_reward"].item() == pytest.approx(max(present))
    assert result.metrics["mean_reward"].item() == pytest.approx(sum(present) / len(present))

    strengths = [math.exp(s) for s in SPEC_SCORES]
    likelihood = math.prod(strengths[i] / sum(strengths[i:]) for i in range(4))
    order = plackett_luce_loss(torch.tensor([SPEC_SCORES]), torch.tensor([[0, 1, 2, 3]]))
    assert order.loss.item() == pytest.approx(-math.log(likelihood) / 3, rel=1e-5)
    assert order.metrics["choices"].item() == 3
    every_order = [torch.tensor([p]) for p in itertools.permutations(range(4))]
    total = sum(
        math.exp(-3 * plackett_luce_loss(torch.tensor([SPEC_SCORES]), ranks).loss.item()) for ranks in every_order
    )
    assert total == pytest.approx(1, rel=1e-5)


def test_spec_1_pair_losses(backend_name):
    """SPEC section 2, number 1: each pair, their sum, the prompt's loss."""
    expected = {(0, 1): 0.342, (0, 2): 0.201, (0, 3): 0.095, (1, 2): 0.437, (1, 3): 0.220, (2, 3): 0.371}
    scores = torch.tensor(SPEC_SCORES)
    for (better, worse), loss in expected.items():
        pair = bradley_terry_loss(scores[[better, worse]][None], torch.tensor([[0, 1]]))
        # one unit of the last digit given: the example prints 0.342 for log(1 + exp(-0.9)) = 0.3412
        assert pair.loss.item() == pytest.approx(loss, abs=1e-3)
    result = bradley_terry_loss(scores[None], torch.tensor([[0, 1, 2, 3]]))
    assert result.loss.item() * 6 == pytest.approx(1.666, abs=2e-3)
    assert round(result.loss.item(), 3) == 0.278
    for gap, probability in ((2.3, 0.909), (0.6, 0.646)):
        loss = bradley_terry_loss(torch.tensor([[gap, 0.0]]), torch.tensor([[0, 1]])).loss
        assert round(math.exp(-loss.item()), 3) == probability


def test_spec_5_win_rate_is_a_gap(backend_name):
    """SPEC section 2, number 5: the gap that fits a win rate of 0.85 is 1.735."""
    assert round(math.log(0.85 / 0.15), 3) == 1.735
    gap = torch.tensor([[1.735, 0.0]], requires_grad=True)
    win, lose = (bradley_terry_loss(gap, torch.tensor([ranks])).loss for ranks in ([0, 1], [1, 0]))
    assert math.exp(-win.item()) == pytest.approx(0.85, abs=1e-4)
    (0.85 * win + 0.15 * lose).backward()  # stationary there
    assert gap.grad.abs().max().item() < 1e-4


def test_spec_6_number_of_pairs(backend_name):
    """SPEC section 2, number 6: K = 9 -> 36 pairs, K = 4 -> 6; a batch of 64 prompts with K = 9 has 2304."""
    for prompts, responses, pairs in ((1, 9, 36), (1, 4, 6), (64, 9, 2304)):
        ranks = torch.arange(responses).expand(prompts, responses)
        assert bradley_terry_loss(torch.zeros(prompts, responses), ranks).metrics["pairs"].item() == pairs


@pytest.mark.slow_interpreted
def test_spec_7_linear_reward_model(backend_name):
    """SPEC section 2, number 7: 200 prompts, K = 4, five features; the direction is recovered, cosine > 0.99."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([0.35, 0.25, 0.15, 0.15, 0.10])
    features = torch.randn(300, 4, 5, generator=generator)
    noise = -torch.log(-torch.log(torch.rand(300, 4, generator=generator)))
    ranks = (features @ truth + 0.1 * noise).argsort(1, descending=True).argsort(1)
    weights = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        result = bradley_terry_loss(features[:200] @ weights, ranks[:200])
        assert result.metrics["pairs"].item() == 1200
        result.loss.backward()
        return result.loss

    optimizer.step(closure)
    assert torch.cosine_similarity(weights, truth, dim=0).item() > 0.99
    assert bradley_terry_loss(features[200:] @ weights, ranks[200:]).metrics["accuracy"].item() > 0.70


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", ["ragged", "ties", "absent", "margins", "large_gap", "no_pairs", "empty"])
def test_gradients(backend_name, dtype, reduction, case, assert_close_to_fp64):
    """Against autograd of the definition in float64, with an upstream gradient that is not 1."""
    served(dtype)
    inputs = reference.example_inputs(case, dtype=dtype)
    scores, double = inputs["scores"].requires_grad_(), in_fp64(inputs)
    leaf = double["scores"].detach().requires_grad_()
    loss64 = reference.bradley_terry(**{**double, "scores": leaf})
    pairs = reference.bradley_terry_fwd(**{**double, "scores": leaf.detach()})[2][:, 0]
    upstream = torch.linspace(0.5, 2.0, len(loss64), dtype=torch.float64)
    if reduction != "none":
        upstream = torch.full_like(upstream, 1.7 / (max(int((pairs > 0).sum()), 1) if reduction == "mean" else 1))
    (expected,) = torch.autograd.grad((loss64 * upstream).sum(), leaf)
    loss = public(inputs, scores, reduction=reduction).loss
    loss.backward(upstream.to(loss.dtype) if reduction == "none" else torch.full_like(loss, 1.7))
    assert scores.grad.dtype == dtype
    assert_close_to_fp64(scores.grad, expected, dtype)


def test_gradients_plackett_luce(backend_name, assert_close_to_fp64):
    for case in reference.CASES:
        inputs = reference.example_inputs(case, dtype=torch.float32)
        scores, leaf = inputs["scores"].requires_grad_(), inputs["scores"].detach().double().requires_grad_()
        expected = reference.plackett_luce(leaf, inputs["ranks"], inputs["cu_groups"])
        upstream = torch.linspace(0.5, 2.0, len(expected))
        expected.backward(upstream.double())
        plackett_luce_loss(scores, inputs["ranks"], inputs["cu_groups"], reduction="none").loss.backward(upstream)
        assert_close_to_fp64(scores.grad, leaf.grad, torch.float32)


def test_gradcheck():
    """Finite differences in float64, which the reference serves."""
    inputs = reference.example_inputs("ties", dtype=torch.float64)
    scores = inputs["scores"].requires_grad_()
    assert torch.autograd.gradcheck(lambda s: public(inputs, s).loss, scores)
    order = inputs["ranks"], inputs["cu_groups"]
    assert torch.autograd.gradcheck(lambda s: plackett_luce_loss(s, *order).loss, scores)


def test_trap_04_weighting_of_pairs_and_prompts(backend_name):
    """K = 2 is Bradley-Terry; order of responses is irrelevant; K = 9 weighs like K = 4; ties give 0 or half terms."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 5, generator=generator)
    pair = bradley_terry_loss(torch.stack([a, b], 1), torch.tensor([[0, 1]]).expand(5, 2)).loss
    torch.testing.assert_close(pair, torch.nn.functional.binary_cross_entropy_with_logits(a - b, torch.ones(5)))

    scores, ranks = torch.randn(1, 9, generator=generator), torch.tensor([[0, 1, 1, 3, 4, 2, 2, 5, 0]])
    shuffle = torch.randperm(9, generator=generator)
    for ties in ("drop", "half"):
        same = (
            bradley_terry_loss(scores, ranks, ties=ties).loss,
            bradley_terry_loss(scores[:, shuffle], ranks[:, shuffle], ties=ties).loss,
        )
        torch.testing.assert_close(*same)

    four, nine = torch.randn(4, generator=generator), torch.randn(9, generator=generator)
    whole = torch.cat([four, nine]).requires_grad_()
    ranks = torch.cat([torch.randperm(4, generator=generator), torch.randperm(9, generator=generator)])
    bradley_terry_loss(whole, ranks, torch.tensor([0, 4, 13])).loss.backward()
    alone = [x.clone().requires_grad_() for x in (four, nine)]
    for x, r in zip(alone, ranks.split([4, 9]), strict=True):
        bradley_terry_loss(x[None], r[None]).loss.backward()
    torch.testing.assert_close(whole.grad, torch.cat([x.grad for x in alone]) / 2)

    tied, zero = torch.tensor([[1.5, 0.5]]), torch.tensor([[0, 0]])
    dropped = bradley_terry_loss(tied, zero)
    assert dropped.loss.item() == 0 and dropped.metrics["pairs"].item() == 0
    half = bradley_terry_loss(tied, zero, ties="half")
    expected = 0.5 * (math.log1p(math.exp(-1)) + math.log1p(math.exp(1)))
    assert half.loss.item() == pytest.approx(expected) and half.metrics["pairs"].item() == 1


def check_no_overflow(autocast):
    """A gap of -120 costs 120.0 and pulls with slope 1, in fp32 also under bf16 autocast."""
    for loss_function in (bradley_terry_loss, plackett_luce_loss):
        scores = torch.tensor([[-60.0, 60.0]], requires_grad=True)
        with torch.autocast(scores.device.type, torch.bfloat16, enabled=autocast):
            loss = loss_function(scores, torch.tensor([[0, 1]])).loss
        loss.backward()
        assert loss.dtype == torch.float32 and loss.item() == 120.0
        assert scores.grad.tolist() == [[-1.0, 1.0]]


@pytest.mark.parametrize("autocast", [False, True])
def test_trap_05_no_overflow(backend_name, autocast):
    check_no_overflow(autocast)


def test_trap_05_no_overflow_every_isa(isa):
    check_no_overflow(autocast=False)


def test_num_items_in_batch(backend_name):
    """Micro-batches of 1 and 3 prompts with the global count give the gradient of one batch of 4 (trap 10)."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(4, 5, generator=generator)
    ranks = torch.rand(4, 5, generator=generator).argsort(1)
    grads = []
    for parts in ([4], [1, 3]):
        leaf = scores.clone().requires_grad_()
        for rows, r in zip(leaf.split(parts), ranks.split(parts), strict=True):
            bradley_terry_loss(rows, r, num_items_in_batch=torch.tensor(4)).loss.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_margins_of_prompts_without_responses(backend_name):
    scores, ranks = torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64)
    out = bradley_terry_loss(scores, ranks, margins=torch.zeros(2, 0, 0), reduction="none")
    assert torch.equal(out.loss, torch.zeros(2))


def test_margins(backend_name):
    """A number, [P], [P, K, K] and [S, M] say the same; a margin shifts the gap."""
    scores = torch.tensor([[1.0, 0.2, -0.5]] * 2)
    ranks = torch.tensor([[0, 1, 2], [2, 0, 1]])
    forms = 0.7, torch.tensor([0.7, 0.7]), torch.full((2, 3, 3), 0.7)
    losses = [bradley_terry_loss(scores, ranks, margins=margins, reduction="none").loss for margins in forms]
    flat = bradley_terry_loss(
        scores.flatten(), ranks.flatten(), torch.tensor([0, 3, 6]), margins=torch.full((6, 4), 0.7), reduction="none"
    )
    for other in (*losses[1:], flat.loss):
        torch.testing.assert_close(other, losses[0])
    shifted = bradley_terry_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 1]]), margins=0.7).loss
    assert shifted.item() == pytest.approx(math.log1p(math.exp(-0.3)))
    uneven = torch.zeros(1, 2, 2)
    uneven[0, 1, 0] = 0.7  # entry [winner, loser]
    swapped = bradley_terry_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[1, 0]]), margins=uneven).loss
    torch.testing.assert_close(swapped, shifted)


def test_masked_garbage(backend_name):
    """Padding with rank -1 and NaN or inf scores changes neither loss, gradient nor metrics."""
    generator = torch.Generator().manual_seed(3)
    scores, ranks = torch.randn(3, 4, generator=generator), torch.tensor([[0, 1, 2, 3], [1, 0, 1, 2], [0, 0, 0, 1]])
    for loss_function in (bradley_terry_loss, plackett_luce_loss):
        plain = scores.clone().requires_grad_()
        expected = loss_function(plain, ranks)
        expected.loss.backward()
        for garbage in (torch.nan, torch.inf, -torch.inf):
            padded = torch.cat([torch.full((3, 2), garbage), scores], 1).requires_grad_()
            result = loss_function(padded, torch.cat([torch.full((3, 2), -1), ranks], 1))
            result.loss.backward()
            torch.testing.assert_close(result.loss, expected.loss)
            torch.testing.assert_close(padded.grad[:, 2:], plain.grad)
            assert padded.grad[:, :2].eq(0).all()
            for name, value in expected.metrics.items():
                torch.testing.assert_close(result.metrics[name], value)
        broken = torch.tensor([[1.0, torch.nan, 0.5, 2.0]], requires_grad=True)
        loss_function(broken, torch.tensor([[0, 1, 2, -1]])).loss.backward()
        assert broken.grad[0, 3] == 0  # whatever the responses that count hold


def test_edges(backend_name):
    """No prompt, no response, K = 1, all absent, expanded and strided inputs, int32 ranks and offsets."""
    for shape in ((0, 4), (3, 0), (3, 1)):
        scores = torch.zeros(shape, requires_grad=True)
        result = bradley_terry_loss(scores, torch.zeros(shape, dtype=torch.int64))
        result.loss.backward()
        assert result.loss.item() == 0 and scores.grad.eq(0).all() and result.metrics["accuracy"].isnan()
        assert plackett_luce_loss(scores, torch.zeros(shape, dtype=torch.int64)).loss.item() == 0
    absent = bradley_terry_loss(torch.full((1, 3), torch.nan), torch.full((1, 3), -1))
    assert absent.loss.item() == 0 and absent.metrics["max_reward"].isnan()
    wide = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    ranks = torch.arange(4, dtype=torch.int32).expand(6, 4)
    strided = bradley_terry_loss(wide[:, ::2], ranks).loss
    torch.testing.assert_close(strided, bradley_terry_loss(wide[:, ::2].contiguous(), ranks.long()).loss)
    cu_groups = torch.arange(0, 25, 4, dtype=torch.int32)
    flat = bradley_terry_loss(wide[:, ::2].reshape(-1), ranks.reshape(-1), cu_groups).loss
    torch.testing.assert_close(flat, strided)
    equal = bradley_terry_loss(torch.ones(1, 2), torch.tensor([[0, 1]])).metrics
    assert equal["accuracy"].item() == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(6)}, r"scores has shape \[6\].*\[P, K\]"),
        ({"ranks": torch.zeros(2, 4).long()}, r"ranks has shape \[2, 4\], expected \[2, 3\]"),
        ({"ranks": torch.zeros(2, 3)}, "ranks has dtype float32"),
        ({"scores": torch.zeros(2, 3).long()}, "scores has dtype int64"),
        ({"cu_groups": torch.tensor([0, 6])}, r"scores has shape \[2, 3\].*flat \[S\]"),
        ({"ties": "skip"}, "ties must be one of 'drop', 'half', got 'skip'"),
        ({"reduction": "avg"}, "reduction must be one of"),
        ({"num_items_in_batch": 4, "reduction": "sum"}, "num_items_in_batch goes with reduction='mean'"),
        ({"num_items_in_batch": 0}, "num_items_in_batch must be a number >= 1"),
        ({"margins": torch.zeros(3)}, r"margins has shape \[3\], expected \[2\]"),
        ({"margins": torch.zeros(2, 3)}, r"margins has shape \[2, 3\], expected \[2, 3, 3\]"),
        ({"margins": float("nan")}, "margins must be a number"),
    ],
)
def test_bad_input(change, message):
    arguments = {"scores": torch.zeros(2, 3), "ranks": torch.zeros(2, 3).long(), **change}
    with pytest.raises(ValueError, match=message):
        bradley_terry_loss(**arguments)


def test_bad_groups():
    scores, ranks = torch.zeros(6), torch.zeros(6).long()
    for cu_groups, message in (
        ([0, 4], "cu_groups ends with 4"),
        ([0, 5, 3, 6], "descends"),
        ([1, 6], "starts with 1"),
    ):
        with pytest.raises(ValueError, match=message):
            bradley_terry_loss(scores, ranks, torch.tensor(cu_groups))
    with pytest.raises(ValueError, match="margins has 2 columns, expected at least 4"):
        bradley_terry_loss(scores, ranks, torch.tensor([0, 4, 6]), margins=torch.zeros(6, 2))


def test_contract(backend_name):
    """opcheck, fullgraph compilation, the same bits twice, retained graph, no_grad, detached metrics."""
    inputs = reference.example_inputs("margins", dtype=torch.float32)
    scores = inputs["scores"].requires_grad_()
    arguments = scores, inputs["ranks"], inputs["cu_groups"]
    operators = torch.ops.rlhf_kernels
    torch.library.opcheck(operators.bradley_terry_fwd.default, (*arguments, inputs["margins"], True, 0.1))
    torch.library.opcheck(operators.plackett_luce_fwd.default, arguments)
    saved = torch.rand(len(inputs["cu_groups"]) - 1), scores.detach(), inputs["cu_groups"]
    torch.library.opcheck(operators.bradley_terry_bwd.default, saved)

    compiled = torch.compile(
        lambda s, r, c: bradley_terry_loss(s, r, c, margins=1.0), fullgraph=True, backend="aot_eager"
    )
    eager = bradley_terry_loss(*arguments, margins=1.0)
    graph = compiled(*arguments)
    assert torch.equal(graph.loss, eager.loss)
    expected = torch.autograd.grad(eager.loss, scores, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(graph.loss, scores)[0], expected)
    assert torch.equal(torch.autograd.grad(eager.loss, scores)[0], expected)
    assert torch.equal(bradley_terry_loss(*arguments, margins=1.0).loss, eager.loss)
    assert not any(metric.requires_grad for metric in eager.metrics.values())
    with torch.no_grad():
        assert torch.equal(bradley_terry_loss(*arguments, margins=1.0).loss, eager.loss)


def test_contract_rows_are_independent(backend_name):
    """A prompt's loss and gradient have the same bits whatever else is in the batch.

    The reference is held to 4 eps: PyTorch's exp has other last bits in its vector loop than in the loop's tail.
    """
    tolerance = 4 * torch.finfo(torch.float32).eps if backend_name == "reference" else 0
    generator = torch.Generator().manual_seed(5)
    scores, ranks = torch.randn(7, 9, generator=generator), torch.rand(7, 9, generator=generator).argsort(1)
    whole = scores.clone().requires_grad_()
    losses = bradley_terry_loss(whole, ranks, reduction="none").loss
    losses.sum().backward()
    for p in range(7):
        alone = scores[p : p + 1].clone().requires_grad_()
        loss = bradley_terry_loss(alone, ranks[p : p + 1], reduction="none").loss
        loss.sum().backward()
        torch.testing.assert_close(loss[0], losses[p], rtol=0, atol=tolerance)
        torch.testing.assert_close(alone.grad[0], whole.grad[p], rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", reference.CASES)
def test_values_every_isa(isa, case, assert_close_to_fp64):
    inputs = reference.example_inputs(case, dtype=torch.float32)
    exact = in_fp64(inputs)
    for actual, expected in zip(native.bradley_terry_fwd(**inputs), reference.bradley_terry_fwd(**exact)):
        assert_close_to_fp64(actual, expected, torch.float32)
    order = ("scores", "ranks", "cu_groups")
    plackett_luce = native.plackett_luce_fwd(*(inputs[name] for name in order))
    for actual, expected in zip(plackett_luce, reference.plackett_luce_fwd(*(exact[name] for name in order))):
        assert_close_to_fp64(actual, expected, torch.float32)


@pytest.mark.parametrize("K", [1, 3, 4, 5, 8, 9, 15, 16, 17, 33, 150])
def test_values_every_block_size(isa, K, assert_close_to_fp64):
    """Prompts that fill a vector exactly, by one too few and by one too many, with ties, gaps and pair margins."""
    generator = torch.Generator().manual_seed(K)
    inputs = {
        "scores": torch.randn(3 * K, generator=generator),
        "ranks": torch.randint(-1, K, (3 * K,), generator=generator),
        "cu_groups": torch.arange(4) * K,
        "margins": torch.rand(3 * K, K + 1, generator=generator),
        "ties_half": True,
    }
    for actual, expected in zip(native.bradley_terry_fwd(**inputs), reference.bradley_terry_fwd(**in_fp64(inputs))):
        assert_close_to_fp64(actual, expected, torch.float32, scale=2)


def test_values_wide_ranks(isa):
    """Ranks are compared as 64-bit integers: time stamps order correctly, also when only high or low halves differ."""
    ranks = torch.tensor([2**62, 2**32, 2**32 + 1, 2**31, 2**31 - 1, 0, 2**40 + 2**31, 2**40])
    scores = torch.linspace(-1, 1, 8)
    small = ranks.argsort().argsort()
    cu_groups = torch.tensor([0, 8])
    wide = native.bradley_terry_fwd(scores, ranks, cu_groups, None, False)
    dense = native.bradley_terry_fwd(scores, small, cu_groups, None, False)
    assert all(torch.equal(a, b) for a, b in zip(wide, dense))


def test_pair_loss_accuracy(isa):
    """-log sigmoid over the whole range: relative error of loss and slope at most 4 ulp."""
    gap = torch.linspace(-87, 87, 8001)
    scores = torch.stack([gap, torch.zeros_like(gap)], 1).flatten()
    ranks = torch.tensor([0, 1]).repeat(len(gap))
    loss, grad, _ = native.bradley_terry_fwd(scores, ranks, torch.arange(len(gap) + 1) * 2, None, False)
    exact = torch.nn.functional.softplus(-gap.double(), threshold=1e9)
    slope = -torch.sigmoid(-gap.double())
    limit = 4 * torch.finfo(torch.float32).eps
    assert ((loss.double() - exact).abs() <= limit * exact).all()
    assert ((grad[::2].double() - slope).abs() <= limit * slope.abs()).all()
    assert torch.equal(grad[::2], -grad[1::2])


def test_same_bits_on_any_number_of_threads(isa):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 12, (700,), generator=generator)
    cu_groups = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    scores = torch.randn(int(cu_groups[-1]), generator=generator)
    ranks = torch.randint(0, 9, scores.shape, generator=generator)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(native.bradley_terry_fwd(scores, ranks, cu_groups, None, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    begin, end = cu_groups[77], cu_groups[78]
    alone = native.bradley_terry_fwd(scores[begin:end], ranks[begin:end], torch.tensor([0, end - begin]), None, True)
    loss, grad, stats = results[0]
    assert all(torch.equal(a, b) for a, b in zip(alone, (loss[77:78], grad[begin:end], stats[77:78])))


@pytest.mark.parametrize("margin_shape", ["none", "prompts", "pairs"])
def test_prompts_of_all_sizes_together(isa, margin_shape, assert_close_to_fp64):
    """Small prompts share vectors, large ones fill their own; each has the bits that it has alone."""
    generator = torch.Generator().manual_seed(7)
    sizes = torch.randint(0, 21, (300,), generator=generator)
    cu_groups = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    S, large = int(cu_groups[-1]), torch.randint(0, 3, (300,), generator=generator).repeat_interleave(sizes) == 0
    ranks = torch.randint(-1, 9, (S,), generator=generator)
    ranks = torch.where(large & (ranks >= 0), ranks + 2**40, ranks)
    scores = torch.where(ranks < 0, torch.nan, 3 * torch.randn(S, generator=generator))
    shapes = {"none": None, "prompts": (300,), "pairs": (S, 21)}
    margins = None if shapes[margin_shape] is None else torch.rand(shapes[margin_shape], generator=generator)
    inputs = {"scores": scores, "ranks": ranks, "cu_groups": cu_groups, "margins": margins, "ties_half": True}
    order = ("scores", "ranks", "cu_groups")

    def both(module, inputs):
        choices = module.plackett_luce_fwd(*(inputs[name] for name in order))
        return *module.bradley_terry_fwd(**inputs), *choices

    results = both(native, inputs)
    for actual, expected in zip(results, both(reference, in_fp64(inputs))):
        assert_close_to_fp64(actual, expected, torch.float32, scale=2)
    for p in range(0, 300, 13):
        own = slice(cu_groups[p], cu_groups[p + 1])
        mine = None if margins is None else margins[p : p + 1] if margin_shape == "prompts" else margins[own]
        lonely = {"scores": scores[own], "ranks": ranks[own], "cu_groups": torch.tensor([0, int(sizes[p])])}
        alone = both(native, {**lonely, "margins": mine, "ties_half": True})
        places = (slice(p, p + 1), own, slice(p, p + 1)) * 2
        assert all(torch.equal(a, x[place]) for a, x, place in zip(alone, results, places, strict=True))
