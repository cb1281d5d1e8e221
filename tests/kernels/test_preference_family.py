"""The family of preference losses: each from its paper's formula, sorted ones, sums, divergences, single labels."""

import math

import pytest
import torch

from rlhf_kernels import preference_loss, preferences, unpaired_preference_loss

OP = "preference"
C, R, REF_C, REF_R = -12.0, -15.0, -14.0, -13.5  # one pair: c = 2, r = -1.5, g = 3.5
LENGTHS = 6, 5
BETA = 0.4


def s(x):
    return 1 / (1 + math.exp(-x))


def pair(requires_grad=False):
    found = [torch.tensor([x]) for x in (C, R, REF_C, REF_R)]
    return [x.requires_grad_(requires_grad and n < 2) for n, x in enumerate(found)]


def by_paper(name, c, r, l_c, l_r, beta=BETA, e=0.1):
    """The loss of one pair as the paper writes it, from its log-ratios c, r and log-probs by token."""
    x = beta * (c - r)
    q = [math.exp(beta * c) / (math.exp(beta * c) + math.exp(beta * r))]
    q.append(1 - q[0])
    m = s(x / 0.05)
    return {
        "robust": (-(1 - e) * math.log(s(x)) + e * math.log(s(-x))) / (1 - 2 * e),
        "exo_pair": q[0] * math.log(q[0] / (1 - e)) + q[1] * math.log(q[1] / e),
        "nca_pair": -math.log(s(beta * c)) - 0.5 * math.log(s(-beta * c)) - 0.5 * math.log(s(-beta * r)),
        "bco_pair": -math.log(s(beta * c)) - math.log(s(-beta * r)),
        "sppo_hard": (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
        "aot": -(1 - e) * math.log(s(x)) - e * math.log(s(-x)),
        "aot_unpaired": -(1 - e) * math.log(s(x)) - e * math.log(s(-x)),
        "apo_zero": 1 - s(beta * c) + s(beta * r),
        "apo_down": s(beta * c) + 1 - s(x),
        "discopop": (1 - m) * -math.log(s(x)) + m * math.exp(-x),
        "sft": -l_c,
        "sigmoid_norm": -math.log(s(beta * (c / LENGTHS[0] - r / LENGTHS[1]))),
        "ipo_norm": (c / LENGTHS[0] - r / LENGTHS[1] - 1 / (2 * beta)) ** 2,
    }[name]


NAMES = ("robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down")
NAMES += ("discopop", "sft", "sigmoid_norm", "ipo_norm")


def arguments_of(name):
    options = {"loss_type": name, "beta": BETA}
    if name in ("robust", "exo_pair", "aot", "aot_unpaired"):
        options["label_smoothing"] = 0.1
    if name in ("sft", "sigmoid_norm", "ipo_norm"):
        options |= {f"{side}_lengths": torch.tensor([n]) for side, n in zip(("chosen", "rejected"), LENGTHS)}
    return options


@pytest.mark.parametrize("name", NAMES)
def test_reference(backend_name, name):
    """Value and, by central differences of the paper's formula in Python's floats, both slopes."""
    chosen, rejected, *ref = pair(requires_grad=True)
    ref = (None, None) if name == "sft" else ref
    result = preference_loss(chosen, rejected, *ref, **arguments_of(name))
    c, r = C - REF_C, R - REF_R

    def at(dc=0.0, dr=0.0):
        return by_paper(name, c + dc, r + dr, (C + dc) / LENGTHS[0], (R + dr) / LENGTHS[1])

    assert result.loss.item() == pytest.approx(at(), rel=1e-5)
    result.loss.backward()
    slopes = (at(1e-5) - at(-1e-5)) / 2e-5, (at(0.0, 1e-5) - at(0.0, -1e-5)) / 2e-5
    assert chosen.grad.item() == pytest.approx(slopes[0], rel=1e-4, abs=1e-7)
    assert (0.0 if rejected.grad is None else rejected.grad.item()) == pytest.approx(slopes[1], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("divergence", "score"),
    [
        ("forward_kl", lambda t: 1 - 1 / t),
        ("js_divergence", lambda t: math.log(2 * t / (1 + t))),
        ("alpha_divergence", lambda t: (t**-0.5 - 1) / -0.5),
        (preferences.AlphaDivergence(0.2), lambda t: (t**-0.8 - 1) / -0.8),
        (preferences.AlphaDivergence(1.0), math.log),
        (preferences.AlphaDivergence(1.0 + 1e-5), math.log),
        (preferences.AlphaDivergence(1.7), lambda t: (t**0.7 - 1) / 0.7),
    ],
)
@pytest.mark.parametrize(
    "name", ["sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm", "ipo_norm"]
)
def test_divergences(backend_name, name, divergence, score):
    """f'(pi / ref) in the place of log pi / ref, before it is divided by the length."""
    chosen, rejected, *ref = pair(requires_grad=True)
    options = {**arguments_of(name), "divergence": divergence}
    result = preference_loss(chosen, rejected, *ref, **options)
    near = 1e-4 if divergence == preferences.AlphaDivergence(1.0 + 1e-5) else 1e-5
    formulas = {
        "sigmoid": lambda g: -math.log(s(BETA * g)),
        "hinge": lambda g: max(0.0, 1 - BETA * g),
        "ipo": lambda g: (g - 1 / (2 * BETA)) ** 2,
    }

    def at(dc=0.0, dr=0.0):
        c, r = score(math.exp(C + dc - REF_C)), score(math.exp(R + dr - REF_R))
        if name in ("sigmoid_norm", "ipo_norm"):
            return formulas[name.removesuffix("_norm")](c / LENGTHS[0] - r / LENGTHS[1])
        return formulas[name](c - r) if name in formulas else by_paper(name, c, r, 0.0, 0.0)

    assert result.loss.item() == pytest.approx(at(), rel=near, abs=1e-6)
    result.loss.backward()
    slopes = (at(1e-5) - at(-1e-5)) / 2e-5, (at(0.0, 1e-5) - at(0.0, -1e-5)) / 2e-5
    assert chosen.grad.item() == pytest.approx(slopes[0], rel=1e-3, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(slopes[1], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha_divergence", "js_divergence"])
def test_divergence_far_from_the_reference(backend_name, divergence):
    """Log-ratios of -100 and -3000, where e^100 is not a float32: the loss and both gradients are finite numbers."""
    chosen = torch.tensor([0.0, -100.0, -3000.0], requires_grad=True)
    rejected = torch.tensor([-100.0, 0.0, -3000.0], requires_grad=True)
    zero = torch.zeros(3)
    loss = preference_loss(chosen, rejected, zero, zero, divergence=divergence, reduction="none").loss
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()
    assert loss[1] > loss[2] > loss[0] >= 0 and loss[2].item() == pytest.approx(math.log(2), rel=1e-6)


def test_tails(backend_name):
    """Gaps of -120 and 120 beta: what the formulas come to, where their parts overflow or vanish."""
    policy, zero = torch.tensor([-1200.0, 1200.0], requires_grad=True), torch.zeros(2)

    def loss(name, **options):
        result = preference_loss(policy, zero, zero, zero, loss_type=name, reduction="none", **options).loss
        (grad,) = torch.autograd.grad(result.sum(), policy)
        return result.tolist(), (10 * grad).tolist()  # beta is 0.1

    approx = pytest.approx
    assert loss("discopop")[0] == approx([120.0, 0.0]) and loss("discopop")[1] == approx([-1.0, 0.0], abs=1e-30)
    exo = -math.log(0.01), -math.log(0.99)
    assert loss("exo_pair", label_smoothing=0.01)[0] == approx(exo)
    assert loss("exo_pair", label_smoothing=0.01)[1] == approx([0.0, 0.0], abs=1e-30)
    assert loss("nca_pair")[0] == approx([120 + 0.5 * math.log(2), 60 + 0.5 * math.log(2)])
    assert loss("nca_pair")[1] == approx([-1.0, 0.5])
    assert loss("bco_pair")[0] == approx([120 + math.log(2), math.log(2)])
    assert loss("robust", label_smoothing=0.1)[0] == approx(
        [135.0, -15.0]
    )  # 120 (1 - e) / (1 - 2 e), -120 e / (1 - 2 e)
    assert loss("apo_zero")[0] == approx([1.5, 0.5]) and loss("apo_down")[0] == approx([1.0, 1.0])


def test_small_gaps_of_discopop_and_exo(backend_name, assert_close_to_fp64):
    """Where both parts of the losses matter: 2000 gaps in beta g from -20 to 20, against float64."""
    gap = torch.linspace(-200, 200, 2000, requires_grad=True)
    zero, exact = torch.zeros_like(gap), gap.detach().double().requires_grad_()
    x = 0.1 * exact
    log_q, log_rest = -torch.log1p(torch.exp(-x)), -torch.log1p(torch.exp(x))
    formulas = {
        preferences.DiscoPOP(): (1 - torch.sigmoid(x / 0.05)) * -log_q + torch.exp(-x) * torch.sigmoid(x / 0.05),
        preferences.DiscoPOP(0.5): (1 - torch.sigmoid(x / 0.5)) * -log_q + torch.exp(-x) * torch.sigmoid(x / 0.5),
        preferences.ExoPair(): log_q.exp() * (log_q - math.log(0.999)) + log_rest.exp() * (log_rest - math.log(1e-3)),
    }
    for loss_type, expected in formulas.items():
        loss = preference_loss(gap, zero, zero, zero, loss_type=loss_type, reduction="none").loss
        assert_close_to_fp64(loss, expected.detach(), torch.float32, scale=20)
        (grad,) = torch.autograd.grad(loss.sum(), gap)
        (exact_grad,) = torch.autograd.grad(expected.sum(), exact, retain_graph=True)
        assert_close_to_fp64(grad, exact_grad, torch.float32, scale=20)


def batch(count, seed=0, dtype=torch.float32):
    """(chosen, rejected, their references), and lengths of both."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (2, count), generator=generator)
    policy = -lengths * torch.rand(2, count, generator=generator, dtype=torch.float64)
    ref = policy + torch.randn(2, count, generator=generator, dtype=torch.float64)
    chosen, rejected = policy.to(dtype).unbind()
    return [chosen.clone().requires_grad_(), rejected.clone().requires_grad_(), *ref.to(dtype).unbind()], lengths


@pytest.mark.parametrize("by_token", [False, True])
def test_sorted_losses(backend_name, by_token):
    """aot and aot_unpaired by a loop in float64: sorted in Python, each slope sent to the pair that it came from."""
    tensors, lengths = batch(9)
    n = lengths.double() if by_token else torch.ones(2, 9, dtype=torch.float64)
    c, r, ref_c, ref_r = (x.detach().double() / n[i % 2] for i, x in enumerate(tensors))
    for unpaired in (False, True):
        ours, theirs = (c - ref_c, r - ref_r) if unpaired else (c - r, ref_c - ref_r)
        order, other = sorted(range(9), key=lambda i: ours[i]), sorted(range(9), key=lambda i: theirs[i])
        losses, grads = [], torch.zeros(2, 9, dtype=torch.float64)
        for i, j in zip(order, other):
            x = BETA * (ours[i] - theirs[j]).item()
            losses.append(-0.9 * math.log(s(x)) - 0.1 * math.log(s(-x)))
            slope = BETA * (0.1 - s(-x))
            grads[0, i] += slope / n[0, i]
            grads[1, j if unpaired else i] -= slope / n[1, j if unpaired else i]
        kind = preferences.AOTUnpaired if unpaired else preferences.AOT
        options = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]} if by_token else {}
        loss_type = kind(label_smoothing=0.1, length_normalized=by_token)
        result = preference_loss(*tensors, loss_type=loss_type, beta=BETA, reduction="none", **options)
        assert result.loss.tolist() == pytest.approx(losses, rel=1e-4)
        found = torch.autograd.grad(result.loss.sum(), tensors[:2])
        torch.testing.assert_close(torch.stack(found).double(), grads, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result.chosen_rewards.double(), BETA * (c - ref_c), rtol=1e-4, atol=1e-5)


def test_sft_is_the_mean_over_tokens(backend_name):
    """Responses of 2 and 8 tokens: -(-3 - 4) / 10; in two calls with the mean length of both the same gradient."""
    logps, lengths = torch.tensor([-3.0, -4.0], requires_grad=True), torch.tensor([2, 8])
    sides = {"chosen_lengths": lengths, "rejected_lengths": lengths}
    whole = preference_loss(logps, logps.detach(), loss_type="sft", **sides)
    assert whole.loss.item() == pytest.approx(0.7)
    assert whole.chosen_rewards.tolist() == pytest.approx([0.1 * -1.5, 0.1 * -0.5])
    (expected,) = torch.autograd.grad(whole.loss, logps)
    for mean_length in (5.0, torch.tensor(5.0)):
        for n in range(2):
            one = {name: x[n : n + 1] for name, x in sides.items()}
            loss_type = preferences.SFT(mean_length=mean_length)
            part = slice(n, n + 1)
            loss = preference_loss(logps[part], logps.detach()[part], loss_type=loss_type, num_items_in_batch=2, **one)
            (grad,) = torch.autograd.grad(loss.loss, logps)
            torch.testing.assert_close(grad[n], expected[n])


def test_weighted_sum(backend_name):
    """0.8 sigmoid + 0.2 bco_pair + sft (MPO's three), each as alone; sums and means of log-probs side by side."""
    tensors, lengths = batch(6)
    sides = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    parts = {"sigmoid": (0.8, {}), "bco_pair": (0.2, {}), "sft": (1.0, sides)}
    expected, grads = 0.0, torch.zeros(2, 6)
    for name, (weight, options) in parts.items():
        refs = () if name == "sft" else tensors[2:]
        alone = preference_loss(*tensors[:2], *refs, loss_type=name, reduction="none", **options)
        expected = expected + weight * alone.loss.detach()
        for side, grad in enumerate(torch.autograd.grad(alone.loss.sum(), tensors[:2], allow_unused=True)):
            grads[side] += 0 if grad is None else weight * grad
    loss_type = [("sigmoid", 0.8), (preferences.BCOPair(), 0.2), "sft"]
    for order in (loss_type, loss_type[::-1]):
        both = preference_loss(*tensors, loss_type=order, reduction="none", **sides)
        torch.testing.assert_close(both.loss, expected)
        torch.testing.assert_close(torch.stack(torch.autograd.grad(both.loss.sum(), tensors[:2])), grads)
        torch.testing.assert_close(both.chosen_rewards, 0.1 * (tensors[0] - tensors[2]).detach())


def test_label_smoothing_of_named_losses(backend_name):
    """It goes to those names that have it, and to no loss that brings its own."""
    tensors, _ = batch(5)
    mixed = preference_loss(*tensors, loss_type=["robust", "apo_zero", preferences.Sigmoid()], label_smoothing=0.2)
    parts = [
        preference_loss(*tensors, loss_type="robust", label_smoothing=0.2),
        preference_loss(*tensors, loss_type="apo_zero"),
        preference_loss(*tensors),
    ]
    torch.testing.assert_close(mixed.loss, sum(part.loss for part in parts))


def test_weights(backend_name):
    """A constant factor of each pair; the mean still counts pairs."""
    tensors, _ = batch(4)
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5], requires_grad=True)
    each = preference_loss(*tensors, reduction="none").loss
    weighted = preference_loss(*tensors, weights=weights)
    assert weighted.loss.item() == pytest.approx(((each * weights).sum() / 4).item())
    found = torch.autograd.grad(weighted.loss, tensors[0], retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(each.sum(), tensors[0])[0] * weights.detach() / 4)
    assert torch.autograd.grad(weighted.loss, weights, allow_unused=True)[0] is None


def test_bco_shift(backend_name):
    """delta, the running mean of rewards, as a number and as a tensor on the device."""
    c, r, delta = BETA * (C - REF_C), BETA * (R - REF_R), 0.3
    expected = -math.log(s(c - delta)) - math.log(s(delta - r))
    for number in (delta, torch.tensor(delta), torch.tensor(delta, dtype=torch.float64)):
        result = preference_loss(*pair(), loss_type=preferences.BCOPair(delta=number), beta=BETA)
        assert result.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unpaired(backend_name, served, loss_type, dtype, assert_close_to_fp64):
    """Labels in any order, weights of both, by a loop in float64; lengths divide the log-ratio."""
    served(dtype)
    tensors, lengths = batch(8, dtype=dtype)
    policy, ref = tensors[0], tensors[2]
    labels = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0])
    for n in (None, lengths[0]):
        expected, grads, rewards = [], [], []
        for i in range(8):
            length = 1 if n is None else n[i].item()
            c = (policy[i].item() - ref[i].item()) / length
            z, sign, weight = (0.35 if loss_type == "kto" else 0.0), *((1, 1.5) if labels[i] else (-1, 0.5))
            x = BETA * sign * (c - z)
            expected.append(weight * s(-x))
            grads.append(-weight * BETA * sign * s(x) * s(-x) / length * 0.7)
            rewards.append(BETA * c)
        options = {"kl": 0.35} if loss_type == "kto" else {}
        result = unpaired_preference_loss(
            policy, labels, ref, loss_type=loss_type, beta=BETA, desirable_weight=1.5, undesirable_weight=0.5,
            lengths=n, reduction="none", **options,
        )  # fmt: skip
        as_fp64 = {"dtype": torch.float64}
        assert_close_to_fp64(result.loss, torch.tensor(expected, **as_fp64), torch.float32, scale=4)
        (grad,) = torch.autograd.grad(result.loss, policy, torch.full_like(result.loss, 0.7))
        assert grad.dtype == dtype
        assert_close_to_fp64(grad, torch.tensor(grads, **as_fp64), dtype, scale=4)
        assert_close_to_fp64(result.rewards, torch.tensor(rewards, **as_fp64), torch.float32, scale=4)
        mean = {True: [], False: []}
        for i in range(8):
            mean[bool(labels[i])].append(rewards[i])
        chosen, rejected = (sum(mean[k]) / len(mean[k]) for k in (True, False))
        assert result.metrics["rewards/chosen"].item() == pytest.approx(chosen, rel=1e-4, abs=1e-5)
        assert result.metrics["rewards/margins"].item() == pytest.approx(chosen - rejected, rel=1e-4, abs=1e-5)
    for labels in (torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)):
        metrics = unpaired_preference_loss(policy, labels, ref, kl=0.1).metrics
        assert metrics["rewards/chosen"].isnan() != metrics["rewards/rejected"].isnan()


def test_unpaired_is_kto_of_both_sides(backend_name):
    """The same numbers as preference_loss takes apart, with a negative KL that counts as 0, and none at all."""
    tensors, _ = batch(7)
    labels = torch.tensor([True, False, True, True, False, False, True])
    for kl in (0.2, torch.tensor(-0.5)):
        sides = [x[keep] for x in (tensors[0], tensors[2]) for keep in (labels, ~labels)]
        apart = preference_loss(*sides, loss_type="kto", kl=kl, desirable_weight=1.3)
        mixed = unpaired_preference_loss(tensors[0], labels, tensors[2], kl=kl, desirable_weight=1.3)
        torch.testing.assert_close(mixed.loss, apart.loss)
        for side in ("chosen", "rejected"):
            torch.testing.assert_close(mixed.metrics[f"logps/{side}"], apart.metrics[f"logps/{side}"])
    empty = torch.zeros(0, requires_grad=True)
    result = unpaired_preference_loss(empty, torch.zeros(0, dtype=torch.bool), empty, kl=0.1)
    result.loss.backward()
    assert result.loss.item() == 0.0 and result.metrics["rewards/margins"].isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": None}, "kl is None, but loss_type='kto' needs"),
        ({"loss_type": "apo_zero_unpaired"}, "kl is an argument of loss_type='kto' only"),
        ({"loss_type": "dpo"}, "loss_type must be one of 'kto', 'apo_zero_unpaired', got 'dpo'"),
        ({"labels": torch.zeros(2, dtype=torch.bool)}, r"labels has shape \[2\], expected \[3\]"),
        ({"ref_logps": torch.zeros(2)}, r"ref_logps has shape \[2\], expected \[3\]"),
        ({"lengths": torch.ones(3)}, "lengths has dtype float32"),
        ({"beta": 0.0}, "beta must be a number > 0"),
        ({"desirable_weight": -1.0}, "desirable_weight must be a number > 0"),
        ({"reduction": "avg"}, "reduction must be one of"),
    ],
)
def test_unpaired_bad_input(change, message):
    good = {"policy_logps": torch.zeros(3), "labels": torch.ones(3, dtype=torch.bool), "ref_logps": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        unpaired_preference_loss(**(good | {"kl": 0.1} | change))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preferences.Sigmoid(label_smoothing=0.5), "label_smoothing must be a number >= 0 and < 0.5, got 0.5"),
        (lambda: preferences.ExoPair(label_smoothing=0.0), "label_smoothing of exo_pair must be a number > 0"),
        (lambda: preferences.DiscoPOP(tau=0), "tau must be a number > 0, got 0"),
        (lambda: preferences.SimPO(target_margin=-1), "target_margin must be a number >= 0"),
        (lambda: preferences.BCOPair(delta=torch.zeros(2)), r"delta has shape \[2\]"),
        (lambda: preferences.SFT(mean_length=0), "mean_length must be a number > 0"),
        (lambda: preferences.KTO(undesirable_weight=0), "undesirable_weight must be a number > 0"),
        (lambda: preferences.AlphaDivergence(math.nan), "alpha must be a number"),
        (lambda: preferences.IPO(length_normalized=2), "length_normalized must be one of False, True, got 2"),
    ],
)
def test_parameters_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_lengths_beside_losses_that_take_sums():
    tensors, lengths = batch(3)
    sides = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    for loss_type in (preferences.Sigmoid(), ["sigmoid", "hinge"]):
        with pytest.raises(ValueError, match=r"chosen_lengths is given, but .* compares sums, not log-probs per token"):
            preference_loss(*tensors, loss_type=loss_type, **sides)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired", [("discopop", 0.5), "sft"], "exo_pair"])
def test_contract(backend_name, loss_type):
    """fullgraph compilation, the same bits twice, no gradient for the reference."""
    tensors, lengths = batch(6)
    options = {"loss_type": loss_type}
    if isinstance(loss_type, list):
        options |= {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    if loss_type == "exo_pair":
        options["label_smoothing"] = 0.01

    def run(chosen, rejected, *ref):
        return preference_loss(chosen, rejected, *ref, **options).loss

    ref = [x.clone().requires_grad_() for x in tensors[2:]]
    eager = run(*tensors[:2], *ref)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors[:2], *ref)
    assert torch.equal(compiled, eager) and torch.equal(run(*tensors[:2], *ref), eager)
    expected = torch.autograd.grad(eager, (*tensors[:2], *ref), allow_unused=True)
    assert expected[2] is None and expected[3] is None
    found = torch.autograd.grad(compiled, tensors[:2])
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
