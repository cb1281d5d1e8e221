"""linear_jsd and linear_topk_kl: against whole logits by torch in float64."""

import math

import pytest
import torch

from rlhf_kernels import linear_jsd, linear_kl, linear_topk_kl
from rlhf_kernels.reference import distillation as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
BETAS = (0.0, 0.1, 0.5, 1.0)
STUDENT = ("hidden_states", "weight", "bias")


def leaves_of(inputs, dtype):
    return {name: inputs[name].to(dtype).requires_grad_() for name in STUDENT if name in inputs}


def probabilities(inputs, prefix, leaves):
    """[N, V] log-probs of one side, differentiable in the leaves."""
    get = {name: leaves.get(prefix + name, inputs.get(prefix + name)) for name in STUDENT}
    z = get["hidden_states"].double() @ get["weight"].double().t()
    z = z if get["bias"] is None else z + get["bias"].double()
    cap = inputs.get("softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    return (z / inputs.get("temperature", 1.0)).log_softmax(-1)


def wanted(inputs, beta):
    """Divergences from the definition, and the gradients of their sum weighted 1, 2, ...; float64."""
    leaves = leaves_of(inputs, torch.float64)
    s, t = probabilities(inputs, "", leaves), probabilities(inputs, "teacher_", {})

    def kl(a, b):
        return torch.where(a == -math.inf, 0.0, a.exp() * (a - b)).sum(-1)

    some = s > -math.inf  # both sides ban the same tokens: what is left of the vocabulary
    s, t = (x[some].view(len(x), -1) for x in (s, t))
    if beta in (0.0, 1.0):
        value = kl(t, s) if beta == 0 else kl(s, t)
    else:
        m = ((1 - beta) * s.exp() + beta * t.exp()).log()
        value = beta * kl(t, m) + (1 - beta) * kl(s, m)
    weights = torch.arange(1, len(value) + 1, dtype=torch.float64)
    return value, dict(zip(leaves, torch.autograd.grad((weights * value).sum(), list(leaves.values())), strict=True))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in reference.CASES if case != "empty"])
def test_values_and_gradients(backend_name, served, dtype, case, beta, assert_close_to_fp64):
    served(dtype)
    inputs = reference.example_inputs(case, dtype=dtype)
    value, grads = wanted(inputs, beta)
    leaves = leaves_of(inputs, dtype)
    found = linear_jsd(**{**inputs, **leaves}, beta=beta, chunk_size=3)
    assert_close_to_fp64(found, value.detach(), dtype, 8)
    weights = torch.arange(1, len(found) + 1, dtype=found.dtype)
    for name, grad in zip(leaves, torch.autograd.grad((weights * found).sum(), list(leaves.values())), strict=True):
        assert_close_to_fp64(grad, torch.where(leaves[name].isfinite(), grads[name], 0), dtype, 16)


def test_the_ends_are_linear_kl():
    inputs = reference.example_inputs("capped")
    names = {"ref_hidden_states": "teacher_hidden_states", "ref_weight": "teacher_weight", "ref_bias": "teacher_bias"}
    options = {name: inputs[other] for name, other in names.items()}
    options |= {name: inputs[name] for name in ("hidden_states", "weight", "bias", "temperature", "softcap")}
    for beta, direction in ((0.0, "forward"), (1.0, "reverse")):
        torch.testing.assert_close(
            linear_jsd(**inputs, beta=beta), linear_kl(**options, direction=direction), rtol=1e-5, atol=1e-6
        )


def test_by_hand():
    """A student of (1/2, 1/2) and a teacher of (1/4, 3/4)."""
    one = torch.ones(1, 1)
    student, teacher = torch.zeros(2, 1), torch.tensor([[0.25], [0.75]]).log()
    m = (0.375, 0.625)
    half = 0.5 * (0.25 * math.log(0.25 / m[0]) + 0.75 * math.log(0.75 / m[1]))
    half += 0.5 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1]))
    assert linear_jsd(one, student, one, teacher).item() == pytest.approx(half, rel=1e-6)


def test_bounds_and_edges():
    """Disjoint sides are log 2 apart at beta 1/2, equal ones 0; empty batches and one token."""
    one, far = torch.ones(1, 1), torch.tensor([[200.0], [-200.0]])
    assert linear_jsd(one, far, one, -far).item() == pytest.approx(math.log(2), rel=1e-6)
    assert linear_jsd(one, far, one, far).item() == 0
    assert linear_jsd(**reference.example_inputs("empty")).shape == (0,)
    inputs = reference.example_inputs("small")
    shaped = {k: x.view(1, 7, -1) if "hidden" in k else x for k, x in inputs.items()}
    assert torch.equal(linear_jsd(**shaped), linear_jsd(**inputs).view(1, 7))


@pytest.mark.parametrize("tail", ("bucket", "drop", "renormalize"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_teachers_top_tokens(dtype, tail, assert_close_to_fp64):
    inputs = reference.example_inputs("capped", dtype=dtype)
    leaves = leaves_of(inputs, torch.float64)
    s, t = probabilities(inputs, "", leaves), probabilities(inputs, "teacher_", {})
    log_t, ids = t.topk(5)
    log_s = s.gather(1, ids)
    if tail == "renormalize":
        log_t, log_s = log_t.log_softmax(1), log_s.log_softmax(1)
    value = (log_t.exp() * (log_t - log_s)).sum(1)
    if tail == "bucket":
        rest_t, rest_s = 1 - log_t.exp().sum(1), 1 - log_s.exp().sum(1)
        value = value + rest_t * (rest_t / rest_s).log()
    expected = torch.autograd.grad(value.sum(), list(leaves.values()))
    mine = leaves_of(inputs, dtype)
    options = {name: inputs[name] for name in ("temperature", "softcap")}
    given = t.topk(5).values.to(torch.float64 if dtype == torch.float64 else torch.float32)
    found = linear_topk_kl(*list(mine.values())[:2], ids, given, bias=mine["bias"], tail=tail, **options)
    assert_close_to_fp64(found, value.detach(), dtype, 8)
    for grad, exact in zip(torch.autograd.grad(found.sum(), list(mine.values())), expected, strict=True):
        assert_close_to_fp64(grad, exact, dtype, 16)


def test_all_tokens_of_the_teacher_are_the_whole_kl():
    inputs = reference.example_inputs("small")
    t = probabilities(inputs, "teacher_", {})
    log_t, ids = t.sort(descending=True)
    found = linear_topk_kl(inputs["hidden_states"], inputs["weight"], ids, log_t.float())
    torch.testing.assert_close(found, linear_jsd(**inputs, beta=0.0), rtol=1e-4, atol=1e-5)


def test_bad_input():
    inputs = reference.example_inputs("small")

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            linear_jsd(**{**inputs, **changes})

    refused("beta", beta=1.5)
    refused("teacher_weight has shape", teacher_weight=inputs["teacher_weight"][:3])
    refused("teacher_hidden_states has shape", teacher_hidden_states=inputs["teacher_hidden_states"][:3])
    refused("temperature", temperature=0.0)
    ids, log_p = torch.zeros(7, 2, dtype=torch.int64), torch.zeros(7, 2)
    for changes, message in (
        ({"tail": "keep"}, "tail must be one of"),
        ({"ids": ids[:3]}, "teacher_ids has shape"),
        ({"ids": ids - 1}, r"teacher_ids holds -1 at position \[0, 0\]"),
        ({"log_p": log_p[:, :1]}, "teacher_log_probs has shape"),
    ):
        options = {"ids": ids, "log_p": log_p, "tail": "drop", **changes}
        with pytest.raises(ValueError, match=message):
            linear_topk_kl(
                inputs["hidden_states"], inputs["weight"], options["ids"], options["log_p"], tail=options["tail"]
            )
