"""preference_loss: the seven questions, the closed form of SPEC section 1, trap 5."""

import math

import pytest
import torch

from rlhf_kernels import bradley_terry_loss, preference_loss, preferences
from rlhf_kernels.cpu import preference as native
from rlhf_kernels.reference import preference as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TENSORS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "anchor")
OPERATOR = (
    *TENSORS[:4],
    *("chosen_lengths", "rejected_lengths", "anchor", "term", "beta", "a", "b", "divergence", "alpha"),
)
NAMED = ("ipo", "hinge", "orpo", "nca_pair", "sppo_hard", "apo_zero", "apo_down")
FREE = ("orpo", "simpo")
REST = (1.0, 0.0, 0.0, "reverse_kl", 1.0)  # beta, a, b, divergence, alpha of an operator's call


def loss_of(inputs):
    """The loss_type and its own arguments of example_inputs."""
    term, a, b = (inputs[name] for name in ("term", "a", "b"))
    if term == "kto":
        return {"loss_type": "kto", "kl": inputs["anchor"], "desirable_weight": a, "undesirable_weight": b}
    if term == "sigmoid" and a < 0:
        return {"loss_type": "robust", "label_smoothing": 0.1}
    if term == "sigmoid" and inputs["ref_chosen"] is None:
        return {"loss_type": "simpo", "label_smoothing": a, "target_margin": b}
    if term == "sigmoid":
        return {"loss_type": "sigmoid", "label_smoothing": a}
    if term == "exo_pair":
        return {"loss_type": "exo_pair", "label_smoothing": 0.01}
    if term == "discopop":
        return {"loss_type": preferences.DiscoPOP(tau=a)}
    if term == "bco_pair":
        return {"loss_type": preferences.BCOPair(delta=0.0 if inputs["anchor"] is None else inputs["anchor"])}
    assert term in NAMED
    return {"loss_type": term}


def public(inputs, **options):
    """preference_loss on example_inputs."""
    arguments = {name: inputs[name] for name in ("chosen_lengths", "rejected_lengths", "beta")} | loss_of(inputs)
    if inputs["divergence"] != "reverse_kl":
        js = inputs["divergence"] == "js_divergence"
        arguments["divergence"] = "js_divergence" if js else preferences.AlphaDivergence(inputs["alpha"])
    return preference_loss(*(inputs[name] for name in TENSORS[:4]), **{**arguments, **options})


def cast(inputs, dtype, requires_grad=False):
    """The same inputs in another dtype, with fresh leaves."""
    result = dict(inputs)
    for name in TENSORS:
        if inputs[name] is not None:
            leaf = requires_grad and name in ("chosen", "rejected")
            result[name] = inputs[name].detach().to(dtype).requires_grad_(leaf)
    return result


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", reference.CASES)
def test_values(backend_name, served, dtype, case, assert_close_to_fp64):
    served(dtype)
    inputs = reference.example_inputs(case, dtype=dtype)
    inputs = inputs if case != "certain" or dtype == torch.float64 else certain_like(inputs, dtype)
    expected = reference.preference(**cast(inputs, torch.float64))
    # the largest number that is subtracted, in units of the loss, sets how many digits cancel
    assert_close_to_fp64(public(inputs, reduction="none").loss, expected, dtype, scale=50)


def certain_like(inputs, dtype):
    """Probability 1 is held below 1 by the eps of the arithmetic: compare where fp32 and fp64 hold the same."""
    return {**inputs, "chosen": inputs["chosen"] - 0.5, "rejected": inputs["rejected"] - 0.5}


def test_reference(backend_name):
    """Each loss type from its paper's formula, in plain Python on one pair."""
    c, r, rc, rr, lc, lr, beta = -12.0, -15.0, -14.0, -13.5, 6, 5, 0.4
    gap = (c - rc) - (r - rr)
    odds = {name: math.exp(x) / (1 - math.exp(x)) for name, x in (("c", c / lc), ("r", r / lr))}
    expected = {
        "sigmoid": -math.log(sigmoid(beta * gap)),
        "ipo": (gap - 1 / (2 * beta)) ** 2,
        "hinge": max(0.0, 1 - beta * gap),
        "simpo": -math.log(sigmoid(beta * (c / lc - r / lr) - 0.5)),
        "orpo": -c / lc - beta * math.log(sigmoid(math.log(odds["c"] / odds["r"]))),
    }
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor([x]) for x in (c, r, rc, rr))
    lengths = {"chosen_lengths": torch.tensor([lc]), "rejected_lengths": torch.tensor([lr])}
    for loss_type, value in expected.items():
        free = loss_type in ("orpo", "simpo")
        ref = () if free else (ref_chosen, ref_rejected)
        options = lengths if free else {}
        result = preference_loss(chosen, rejected, *ref, loss_type=loss_type, beta=beta, **options)
        assert result.loss.item() == pytest.approx(value, rel=1e-5), loss_type
    smoothed = preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=0.1)
    value = -0.9 * math.log(sigmoid(beta * gap)) - 0.1 * math.log(sigmoid(-beta * gap))
    assert smoothed.loss.item() == pytest.approx(value, rel=1e-5)
    per_token = (c - rc) / lc - (r - rr) / lr
    mean_ipo = preference_loss(chosen, rejected, ref_chosen, ref_rejected, loss_type="ipo", beta=beta, **lengths)
    assert mean_ipo.loss.item() == pytest.approx((per_token - 1 / (2 * beta)) ** 2, rel=1e-5)

    metrics = preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta).metrics
    assert metrics["rewards/chosen"].item() == pytest.approx(beta * 2.0)
    assert metrics["rewards/rejected"].item() == pytest.approx(beta * -1.5)
    assert metrics["rewards/margins"].item() == pytest.approx(beta * 3.5)
    assert metrics["rewards/accuracies"].item() == 1.0 and metrics["logps/chosen"].item() == -12.0


def test_reference_kto(backend_name):
    """Unpaired: three desirable and one undesirable response; a negative KL estimate counts as 0."""
    policy, ref, beta = [-5.0, -9.0, -7.0], [-6.0, -8.5, -7.0], 0.3
    for kl, anchor in ((0.4, 0.4), (-1.0, 0.0), (torch.tensor(0.4), 0.4)):
        result = preference_loss(
            *(torch.tensor(x) for x in (policy, [-4.0], ref, [-5.0])),
            **{"loss_type": "kto", "beta": beta, "kl": kl, "desirable_weight": 1.5, "reduction": "none"},
        )
        wanted = [1.5 * (1 - sigmoid(beta * (p - q - anchor))) for p, q in zip(policy, ref, strict=True)]
        wanted.append(1 - sigmoid(beta * (anchor - 1.0)))
        assert result.loss.tolist() == pytest.approx(wanted, rel=1e-5)
        assert result.chosen_rewards.shape == (3,) and result.rejected_rewards.tolist() == pytest.approx([0.3])
        assert "rewards/accuracies" not in result.metrics


def test_spec_1_closed_form_of_the_optimal_policy(backend_name):
    """pi* = pi_ref exp(r / beta) / Z: DPO on pi* is Bradley-Terry on r, and pi* is where the expected loss is flat."""
    generator = torch.Generator().manual_seed(0)
    reward, beta = torch.randn(6, generator=generator), 0.3
    ref = torch.randn(6, generator=generator).log_softmax(0)
    logits = (ref + reward / beta).requires_grad_()
    policy = logits.log_softmax(0)
    better, worse = torch.triu_indices(6, 6, 1)
    for first, second in ((better, worse), (worse, better)):
        dpo = preference_loss(policy[first], policy[second], ref[first], ref[second], beta=beta, reduction="none")
        ranks = torch.tensor([[0, 1]]).expand(len(first), 2)
        pairs = torch.stack([reward[first], reward[second]], 1)
        torch.testing.assert_close(dpo.loss, bradley_terry_loss(pairs, ranks, reduction="none").loss)
        torch.testing.assert_close(dpo.chosen_rewards - dpo.rejected_rewards, reward[first] - reward[second])
    wins = torch.sigmoid(reward[better] - reward[worse])
    arguments = {"beta": beta, "reduction": "none"}
    one = preference_loss(policy[better], policy[worse], ref[better], ref[worse], **arguments).loss
    other = preference_loss(policy[worse], policy[better], ref[worse], ref[better], **arguments).loss
    (wins * one + (1 - wins) * other).sum().backward()
    assert logits.grad.abs().max().item() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", reference.CASES)
def test_gradients(backend_name, served, dtype, reduction, case, assert_close_to_fp64):
    """Against autograd of the definition in float64, with an upstream gradient that is not 1."""
    served(dtype)
    inputs = reference.example_inputs(case, dtype=dtype)
    inputs = inputs if case != "certain" or dtype == torch.float64 else certain_like(inputs, dtype)
    actual, exact = cast(inputs, dtype, True), cast(inputs, torch.float64, True)
    expected = reference.preference(**exact)
    upstream = torch.linspace(0.5, 2.0, len(expected), dtype=torch.float64)
    if reduction != "none":
        upstream = torch.full_like(upstream, 1.7 / (max(len(expected), 1) if reduction == "mean" else 1))
    expected.backward(upstream)
    loss = public(actual, reduction=reduction).loss
    loss.backward(upstream.to(loss.dtype) if reduction == "none" else torch.full_like(loss, 1.7))
    for name in ("chosen", "rejected"):
        assert actual[name].grad.dtype == dtype
        assert_close_to_fp64(actual[name].grad, exact[name].grad, dtype, scale=50)


def test_gradcheck():
    """Finite differences in float64, which the reference serves."""
    for case in reference.CASES:
        if "large_gap" in case or case in ("certain", "empty"):
            continue
        inputs = cast(reference.example_inputs(case, dtype=torch.float64), torch.float64, True)

        def loss(chosen, rejected, inputs=inputs):
            return public({**inputs, "chosen": chosen, "rejected": rejected}).loss

        assert torch.autograd.gradcheck(loss, (inputs["chosen"], inputs["rejected"]))


@pytest.mark.parametrize("autocast", [False, True])
def test_trap_05_no_overflow(backend_name, autocast):
    """beta * gap = -120 costs 120.0 with a finite gradient, in fp32 also under bf16 autocast."""
    chosen, zero = torch.tensor([-1200.0], requires_grad=True), torch.zeros(1)
    with torch.autocast(chosen.device.type, torch.bfloat16, enabled=autocast):
        loss = preference_loss(chosen, zero, zero, zero).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(120.0, rel=1e-6)
    assert chosen.grad.item() == pytest.approx(-0.1)


def test_orpo_with_probability_one(backend_name):
    """A response that the policy is sure of has infinite odds: loss and gradient stay finite."""
    chosen = torch.tensor([0.0, -1e-9, -3.0], requires_grad=True)
    rejected = torch.tensor([-3.0, 0.0, 0.0], requires_grad=True)
    lengths = {"chosen_lengths": torch.ones(3).long(), "rejected_lengths": torch.ones(3).long()}
    loss = preference_loss(chosen, rejected, loss_type="orpo", **lengths).loss
    loss.backward()
    assert loss.isfinite() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


def test_num_items_in_batch(backend_name):
    """Micro-batches of 1 and 6 pairs with the global count give the gradient of one batch of 7 (trap 10)."""
    inputs = reference.example_inputs("sigmoid", dtype=torch.float32)
    grads = []
    for parts in ([7], [1, 6]):
        leaf = inputs["chosen"].clone().requires_grad_()
        rows = [x.split(parts) for x in (leaf, inputs["rejected"], inputs["ref_chosen"], inputs["ref_rejected"])]
        for row in zip(*rows, strict=True):
            preference_loss(*row, num_items_in_batch=torch.tensor(7)).loss.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_edges(backend_name):
    """No pair, no desirable response, references without gradient, strided input."""
    empty = torch.zeros(0, requires_grad=True)
    result = preference_loss(empty, empty, empty, empty)
    result.loss.backward()
    assert result.loss.item() == 0 and result.metrics["rewards/margins"].isnan()
    bad = torch.tensor([-3.0, -4.0], requires_grad=True)
    only_bad = preference_loss(empty.detach(), bad, empty.detach(), bad.detach(), loss_type="kto", kl=0.0)
    only_bad.loss.backward()
    assert only_bad.loss.item() == pytest.approx(0.5) and bad.grad.gt(0).all()
    ref = torch.tensor([-3.0, -4.0], requires_grad=True)
    preference_loss(bad, bad.detach(), ref, ref).loss.backward()
    assert ref.grad is None
    wide = torch.randn(10, generator=torch.Generator().manual_seed(1))
    strided = preference_loss(wide[::2], wide[1::2], wide[::2] + 1, wide[1::2]).loss
    plain = [x.contiguous() for x in (wide[::2], wide[1::2], wide[::2] + 1, wide[1::2])]
    torch.testing.assert_close(strided, preference_loss(*plain).loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": []}, "loss_type is empty"),
        ({"loss_type": "exo_pair"}, "label_smoothing is 0.0, but loss_type='exo_pair' needs"),
        ({"loss_type": ["sigmoid", "kto"], "kl": 0.1}, "loss_type holds 'kto', which is unpaired"),
        ({"loss_type": [("sigmoid", math.nan)]}, "the weight of a loss must be a number"),
        ({"loss_type": "sigmoid_norm"}, r"chosen_lengths is None, but loss_type='sigmoid_norm' needs \[3\] lengths"),
        ({"loss_type": "sft"}, "ref_chosen_logps is given, but loss_type='sft' has no reference model"),
        ({"divergence": "kl"}, "divergence must be one of 'reverse_kl'.*got 'kl'"),
        (
            {"loss_type": "apo_zero", "divergence": "forward_kl"},
            "divergence='forward_kl' has no meaning for 'apo_zero'",
        ),
        ({"loss_type": "aot", "weights": torch.ones(3)}, "weights has no meaning for 'aot'"),
        ({"weights": torch.ones(2)}, r"weights has shape \[2\], expected \[3\]"),
        ({"loss_type": "dpo"}, "loss_type must be one of 'sigmoid', 'ipo'.*got 'dpo'"),
        ({"beta": 0}, "beta must be a number > 0, got 0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be a number >= 0 and < 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing=0.1 has no meaning for loss_type='ipo'"),
        ({"ref_chosen_logps": None}, "ref_chosen_logps is None, but loss_type='sigmoid' needs"),
        ({"loss_type": "simpo"}, "ref_chosen_logps is given, but loss_type='simpo' has no reference model"),
        ({"chosen_lengths": torch.ones(3).long()}, "chosen_lengths and rejected_lengths go together"),
        ({"chosen_lengths": torch.ones(3)}, "chosen_lengths has dtype float32"),
        ({"policy_rejected_logps": torch.zeros(2)}, r"policy_rejected_logps has shape \[2\], expected \[3\]"),
        ({"ref_rejected_logps": torch.zeros(2)}, r"ref_rejected_logps has shape \[2\], expected \[3\]"),
        ({"policy_chosen_logps": torch.zeros(3, 1)}, r"policy_chosen_logps has shape \[3, 1\]"),
        ({"target_margin": 1.0}, "target_margin is an argument of loss_type='simpo' only"),
        ({"kl": 1.0}, "kl is an argument of loss_type='kto' only"),
        ({"loss_type": "kto"}, "kl is None, but loss_type='kto' needs"),
        ({"desirable_weight": 2.0}, "desirable_weight is an argument of loss_type='kto' only"),
        ({"undesirable_weight": 0}, "undesirable_weight must be a number > 0"),
        ({"reduction": "avg"}, "reduction must be one of"),
        ({"reduction": "none", "num_items_in_batch": 3}, "num_items_in_batch goes with reduction='mean'"),
    ],
)
def test_bad_input(change, message):
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    with pytest.raises(ValueError, match=message):
        preference_loss(**({name: torch.zeros(3) for name in names} | change))


def test_bad_input_lengths_missing():
    with pytest.raises(ValueError, match=r"chosen_lengths is None, but loss_type='orpo' needs \[3\] lengths"):
        preference_loss(torch.zeros(3), torch.zeros(3), loss_type="orpo")


@pytest.mark.parametrize("case", ["smoothed", "orpo", "kto"])
def test_contract(backend_name, case):
    """opcheck, fullgraph compilation, the same bits twice, retained graph, no_grad, detached metrics and rewards."""
    inputs = cast(reference.example_inputs(case, dtype=torch.float32), torch.float32, True)
    torch.library.opcheck(torch.ops.rlhf_kernels.preference_fwd.default, tuple(inputs[name] for name in OPERATOR))
    for size, rejected in ((3, 3), (5, 2)):
        saved = torch.rand(size), torch.rand(3), torch.rand(rejected)
        torch.library.opcheck(torch.ops.rlhf_kernels.preference_bwd.default, saved)

    leaves = [inputs["chosen"], inputs["rejected"]]

    def run(chosen, rejected):
        return public({**inputs, "chosen": chosen, "rejected": rejected})

    eager, graph = run(*leaves), torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(graph.loss, eager.loss) and torch.equal(run(*leaves).loss, eager.loss)
    expected = torch.autograd.grad(eager.loss, leaves, retain_graph=True)
    for other in (torch.autograd.grad(graph.loss, leaves), torch.autograd.grad(eager.loss, leaves)):
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))
    assert not any(x.requires_grad for x in (*eager.metrics.values(), eager.chosen_rewards, eager.rejected_rewards))
    with torch.no_grad():
        assert torch.equal(run(*leaves).loss, eager.loss)


def test_contract_rows_are_independent(backend_name):
    """A pair's loss and gradient do not depend on the other pairs."""
    inputs = cast(reference.example_inputs("sigmoid", dtype=torch.float32), torch.float32, True)
    whole = public(inputs, reduction="none").loss
    whole.sum().backward()
    for n in range(7):
        row = {name: x[n : n + 1] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        alone = cast(row, torch.float32, True)
        loss = public(alone, reduction="none").loss
        loss.sum().backward()
        torch.testing.assert_close(loss[0], whole[n], rtol=1e-6, atol=0)
        torch.testing.assert_close(alone["chosen"].grad[0], inputs["chosen"].grad[n], rtol=1e-6, atol=0)


def many(loss_type, chosen, rejected, seed=0):
    """Arguments of preference_fwd with that many responses on each side, in float32."""
    generator = torch.Generator().manual_seed(seed)
    inputs = reference.example_inputs("smoothed" if loss_type == "sigmoid" else loss_type, dtype=torch.float32)
    for side, size in (("chosen", chosen), ("rejected", rejected)):
        lengths = torch.randint(1, 400, (size,), generator=generator)
        log_probs = -lengths * torch.rand(size, generator=generator)
        inputs |= {side: log_probs, f"{side}_lengths": lengths}
        inputs[f"ref_{side}"] = log_probs + 10 * torch.randn(size, generator=generator)
        if loss_type in FREE:
            inputs[f"ref_{side}"] = None
    return inputs


@pytest.mark.parametrize("case", reference.CASES)
def test_values_every_isa(isa, case, assert_close_to_fp64):
    inputs = reference.example_inputs(case, dtype=torch.float32)
    inputs = inputs if case != "certain" else certain_like(inputs, torch.float32)
    expected = reference.preference_fwd(**cast(inputs, torch.float64))
    for actual, exact in zip(native.preference_fwd(**inputs), expected, strict=True):
        assert_close_to_fp64(actual, exact, torch.float32, scale=50)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 1000])
@pytest.mark.parametrize("loss_type", (*reference.TERMS, "simpo", "js_divergence", "alpha_divergence"))
def test_values_every_size(isa, loss_type, size, assert_close_to_fp64):
    """Batches that fill a vector exactly, by one too few and by one too many; KTO's sides differ in size."""
    inputs = many(loss_type, size, size if loss_type != "kto" else size // 2, seed=size)
    expected = reference.preference_fwd(**cast(inputs, torch.float64))
    for actual, exact in zip(native.preference_fwd(**inputs), expected, strict=True):
        assert_close_to_fp64(actual, exact, torch.float32, scale=50)


def test_accuracy_of_the_logistic_loss(isa):
    """-log sigmoid over its whole range: loss and slope within 4 ulp of float64."""
    gap = torch.linspace(-86, 86, 8001)
    zero = torch.zeros_like(gap)
    loss, grad, *_ = native.preference_fwd(gap, zero, zero, zero, *(None,) * 3, "sigmoid", *REST)
    exact = torch.nn.functional.softplus(-gap.double(), threshold=1e9)
    slope = torch.sigmoid(-gap.double())
    limit = 4 * torch.finfo(torch.float32).eps
    assert ((loss - exact).abs() <= limit * exact).all()
    assert ((grad + slope).abs() <= limit * slope).all()


def test_accuracy_of_the_odds(isa):
    """ORPO's log odds and their slope from log-probs of -1e-6 to -80, beside a rejected response of even odds."""
    mean = -torch.logspace(-6, math.log10(80), 4001)
    even, one = torch.full_like(mean, math.log(0.5)), torch.ones(4001, dtype=torch.int64)
    loss, grad, _, rewards, _ = native.preference_fwd(mean, even, None, None, one, one, None, "orpo", *REST)
    good, bad = mean.double(), even.double()
    odds = (good - torch.log(-torch.expm1(good))) - (bad - torch.log(-torch.expm1(bad)))
    exact = -good + torch.nn.functional.softplus(-odds, threshold=1e9)
    limit = 8 * torch.finfo(torch.float32).eps
    assert ((loss - exact).abs() <= limit * (1 + exact)).all()
    slope = torch.sigmoid(-odds) / torch.expm1(good) - 1
    assert ((grad - slope).abs() <= limit * (1 + odds.abs()) * slope.abs()).all()
    assert torch.equal(rewards, mean)


def test_infinite_log_probs(isa):
    """A response of probability 0: an infinite or an ideal gap costs inf or 0, with the slope of that limit."""
    impossible, fine = torch.tensor([-math.inf]), torch.tensor([-5.0])
    numbers = ("sigmoid", 0.5, *REST[1:])
    loss, grad, *_ = native.preference_fwd(impossible, fine, fine, fine, None, None, None, *numbers)
    assert (loss.item(), grad.item()) == (math.inf, -0.5)
    loss, grad, *_ = native.preference_fwd(fine, impossible, fine, fine, None, None, None, *numbers)
    assert (loss.item(), grad.item()) == (0.0, 0.0)
    nan = torch.tensor([math.nan])
    one = torch.ones(1, dtype=torch.int64)
    for term in reference.TERMS:
        ref = (None, None) if term == "orpo" else (fine, fine)
        result = native.preference_fwd(nan, fine, *ref, one, one, torch.tensor(0.1), term, 0.5, 0.1, 0.1, *REST[3:])
        assert result[0][0].isnan(), term
    for divergence in reference.DIVERGENCES:
        result = native.preference_fwd(nan, fine, fine, fine, *(None,) * 3, "sigmoid", 0.5, 0.0, 0.0, divergence, 0.5)
        assert result[0][0].isnan() and result[1][0].isnan(), divergence


@pytest.mark.parametrize("loss_type", (*reference.TERMS, "simpo", "js_divergence", "alpha_divergence"))
def test_contract_same_bits(isa, loss_type):
    """On any number of threads, and for a pair alone, wherever it stood in the batch."""
    inputs = many(loss_type, 20011, 20011)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(native.preference_fwd(**inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for n in (0, 5, 16, 8191, 20010):
        row = {k: x[n : n + 1] if isinstance(x, torch.Tensor) and x.dim() else x for k, x in inputs.items()}
        alone = native.preference_fwd(**row)
        picked = [x[n : n + 1] for x in results[0]]
        if loss_type == "kto":
            picked[0] = results[0][0][[n, 20011 + n]]
        assert all(torch.equal(a, b) for a, b in zip(alone, picked, strict=True))
    upstream = torch.rand(len(results[0][0]))
    grads = native.preference_bwd(upstream, *results[0][1:3])
    expected = reference.preference_bwd(upstream, *results[0][1:3])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
