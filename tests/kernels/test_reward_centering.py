"""bradley_terry_loss(center_coef=): the squared sums of the pairs, which keep a reward model's scores near 0."""

import itertools

import pytest
import torch

from rlhf_kernels import bradley_terry_loss
from rlhf_kernels.reference import bradley_terry as reference

OP = "bradley_terry"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COEF = 0.3


def centred_only(inputs, scores=None, **options):
    """What center_coef adds to the loss of each prompt."""
    scores = inputs["scores"] if scores is None else scores
    options |= {"margins": inputs["margins"], "ties": "half" if inputs["ties_half"] else "drop", "reduction": "none"}
    plain, centred = (
        bradley_terry_loss(scores, inputs["ranks"], inputs["cu_groups"], center_coef=coef, **options).loss
        for coef in (0.0, COEF)
    )
    return centred - plain


def loop(inputs):
    """Mean of (s_i + s_j)^2 over each prompt's pairs, and its gradient, pair by pair in Python's floats."""
    cu, ranks, scores = (inputs[name].tolist() for name in ("cu_groups", "ranks", "scores"))
    losses, grad = [], [0.0] * len(scores)
    for begin, end in itertools.pairwise(cu):
        present = [i for i in range(begin, end) if ranks[i] >= 0]
        pairs = [(i, j) for i, j in itertools.combinations(present, 2) if inputs["ties_half"] or ranks[i] != ranks[j]]
        losses.append(sum((scores[i] + scores[j]) ** 2 for i, j in pairs) / max(len(pairs), 1))
        for i, j in pairs:
            for side in (i, j):
                grad[side] += 2 * (scores[i] + scores[j]) / len(pairs)
    return COEF * torch.tensor(losses, dtype=torch.float64), COEF * torch.tensor(grad, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", reference.CASES)
@pytest.mark.parametrize("ties", ["drop", "half"])
def test_values_and_gradients(backend_name, served, dtype, case, ties, assert_close_to_fp64):
    served(dtype)
    inputs = {**reference.example_inputs(case, dtype=dtype), "ties_half": ties == "half"}
    expected, expected_grad = loop(inputs)
    scores = inputs["scores"].detach().requires_grad_()
    options = {"margins": inputs["margins"], "ties": ties, "reduction": "none"}
    rest = inputs["ranks"], inputs["cu_groups"]
    both = bradley_terry_loss(scores, *rest, center_coef=COEF, **options).loss
    alone = bradley_terry_loss(scores, *rest, **options).loss
    assert_close_to_fp64(both.double() - alone.double(), expected, torch.float32, scale=20)
    upstream = torch.linspace(0.5, 2.0, len(both), dtype=both.dtype)
    of_both, of_alone = (
        torch.autograd.grad(loss, scores, upstream)[0] if len(scores) else scores.detach() for loss in (both, alone)
    )
    factor = torch.repeat_interleave(upstream.double(), inputs["cu_groups"].diff(), output_size=len(scores))
    expected_grad = of_alone.double() + factor * expected_grad
    assert_close_to_fp64(of_both, expected_grad, dtype, scale=20)


def test_definition_is_the_loop():
    """reference.bradley_terry, differentiated by autograd in float64."""
    for case in reference.CASES:
        inputs = reference.example_inputs(case, dtype=torch.float64)
        leaf = inputs["scores"].clone().requires_grad_()
        arguments = leaf, inputs["ranks"], inputs["cu_groups"], inputs["margins"], inputs["ties_half"]
        added = reference.bradley_terry(*arguments, COEF) - reference.bradley_terry(*arguments)
        expected, expected_grad = loop(inputs)
        torch.testing.assert_close(added, expected)
        if len(leaf):
            torch.testing.assert_close(torch.autograd.grad(added.sum(), leaf)[0], expected_grad)


def test_pairs_are_trl(backend_name):
    """K = 2: the mean over pairs of (chosen + rejected)^2, by hand; ((1 + 2)^2 + (0.5 - 3)^2) / 2 = 7.625."""
    scores, ranks = torch.tensor([[1.0, 2.0], [0.5, -3.0]], requires_grad=True), torch.tensor([[0, 1], [1, 0]])
    with_it, without = (bradley_terry_loss(scores, ranks, center_coef=coef).loss for coef in (0.01, 0.0))
    assert (with_it - without).item() == pytest.approx(0.07625, rel=1e-5)
    grads = [torch.autograd.grad(loss, scores)[0] for loss in (with_it, without)]
    torch.testing.assert_close(
        grads[0] - grads[1], torch.tensor([[0.03, 0.03], [-0.025, -0.025]]), atol=1e-7, rtol=1e-5
    )


def test_tied_scores_that_cancel(backend_name):
    """Eight tied responses of 100 against one of -100: every pair sums to 0, though the sums over ranks are large."""
    scores, ranks = torch.tensor([[100.0] * 8 + [-100.0]], requires_grad=True), torch.tensor([[0] * 8 + [1]])
    loss = bradley_terry_loss(scores, ranks, center_coef=1.0).loss
    loss.backward()
    assert loss.item() == 0.0 and scores.grad.abs().max().item() == 0.0


def test_shift_is_undone(backend_name):
    """At scores of mean 0 the centring of a pair is flat; a shift of both is pulled back by 4 coef times the shift."""
    scores = torch.tensor([[0.7, -0.7], [1.7, 0.3]], requires_grad=True)
    grads = []
    for coef in (0.5, 0.0):
        loss = bradley_terry_loss(scores, torch.tensor([[0, 1], [0, 1]]), center_coef=coef, reduction="sum").loss
        grads.append(torch.autograd.grad(loss, scores)[0])
    torch.testing.assert_close(grads[0] - grads[1], torch.tensor([[0.0, 0.0], [2.0, 2.0]]))


def test_masked_garbage(backend_name):
    """An absent response may hold NaN or inf: it reaches neither the loss nor a gradient."""
    for garbage in (torch.nan, torch.inf):
        scores = torch.tensor([[1.0, garbage, -0.5], [garbage] * 3], requires_grad=True)
        ranks = torch.tensor([[0, -1, 1], [-1, -1, -1]])
        loss = bradley_terry_loss(scores, ranks, center_coef=1.0).loss
        loss.backward()
        assert loss.item() == pytest.approx(0.25 + torch.nn.functional.softplus(torch.tensor(-1.5)).item())
        assert scores.grad[:, 1].tolist() == [0.0, 0.0] and scores.grad[1].tolist() == [0.0] * 3


def test_neutral_at_zero_and_bad_input(backend_name):
    inputs = reference.example_inputs("ragged", dtype=torch.float32)
    arguments = inputs["scores"], inputs["ranks"], inputs["cu_groups"]
    assert torch.equal(bradley_terry_loss(*arguments, center_coef=0.0).loss, bradley_terry_loss(*arguments).loss)
    for wrong in (-0.1, float("nan"), "0.1"):
        with pytest.raises(ValueError, match="center_coef must be a number >= 0, got"):
            bradley_terry_loss(*arguments, center_coef=wrong)


def test_contract(backend_name):
    """fullgraph compilation, the same bits twice, and for a prompt alone as among others."""
    inputs = reference.example_inputs("ties", dtype=torch.float32)
    cu = inputs["cu_groups"]

    def run(scores):
        return bradley_terry_loss(scores, inputs["ranks"], cu, center_coef=COEF, reduction="none").loss

    eager = run(inputs["scores"])
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(inputs["scores"]), eager)
    assert torch.equal(run(inputs["scores"]), eager)
    added = centred_only({**inputs, "ties_half": False})
    for prompt, (begin, end) in enumerate(itertools.pairwise(cu.tolist())):
        one = {**inputs, "ties_half": False, "cu_groups": torch.tensor([0, end - begin])}
        one |= {name: inputs[name][begin:end] for name in ("scores", "ranks")}
        torch.testing.assert_close(centred_only(one)[0], added[prompt], rtol=1e-6, atol=1e-6)
