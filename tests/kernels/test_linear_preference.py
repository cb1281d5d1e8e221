"""linear_preference_loss and wpo_weights: from hidden states, against full logits in float64."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from rlhf_kernels import linear_preference_loss, preferences, wpo_weights

OP = "linear"
B, T, H, V = 3, 7, 5, 13
IGNORED = -100


class Inputs:
    """Three pairs, first half chosen; prompts in front and padding behind, NaN where nothing counts."""

    def __init__(self, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.labels = torch.randint(0, V, (2 * B, T), generator=generator)
        for row, (begin, end) in enumerate(((1, 4), (2, 7), (0, 3), (2, 7), (3, 5), (1, 3))):
            self.labels[row, :begin] = self.labels[row, end:] = IGNORED
        self.kept = self.labels != IGNORED
        self.hidden, self.weight, self.bias = randn(2 * B, T, H).to(dtype), randn(V, H).to(dtype), randn(V).to(dtype)
        self.hidden[~self.kept] = torch.nan
        self.ref = randn(2 * B, T) - 2
        self.ref[~self.kept] = torch.nan
        self.cu = torch.arange(2 * B + 1) * T

    def leaves(self):
        return [x.clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)]

    def exact(self):
        """Leaves in float64, and from them log-probs of the labels and log sum p^2 from whole logits, [2B, T]."""
        leaves = [x.double().requires_grad_() for x in (self.hidden, self.weight, self.bias)]
        hidden = torch.where(self.kept[..., None], leaves[0], 0)
        every = (hidden @ leaves[1].T + leaves[2]).log_softmax(-1)
        own = every.gather(-1, self.labels.clamp(min=0)[..., None])[..., 0]
        return leaves, own, (2 * every).logsumexp(-1)


def summed(tokens, kept, lengths, ld_alpha):
    """[2B] sums, token by token: beyond the shorter response of a pair a token counts ld_alpha times."""
    sums = []
    for row in range(2 * B):
        shared, total = min(lengths[row], lengths[(row + B) % (2 * B)]), 0.0
        places = [t for t in range(T) if kept[row, t]]
        for place, t in enumerate(places):
            total = total + tokens[row, t] * (1.0 if place < shared else ld_alpha)
        sums.append(total)
    return torch.stack(sums)


def dpo(c, r, beta=0.1):
    return -logsigmoid(beta * (c - r))


# loss_type: the loss of each pair from log-ratios c, r, the responses' log-probs and their lengths
LOSSES = {
    "sigmoid": lambda c, r, p, n: dpo(c, r),
    "ipo_norm": lambda c, r, p, n: (c / n[0] - r / n[1] - 5).square(),
    "simpo": lambda c, r, p, n: -logsigmoid(0.1 * (p[0] / n[0] - p[1] / n[1]) - 0.5),
    "sft": lambda c, r, p, n: -p[0] / n[0].mean(),
    "apo_zero": lambda c, r, p, n: torch.sigmoid(-0.1 * c) + torch.sigmoid(0.1 * r),
}


def expected_losses(inputs, loss_type, ld_alpha=1.0):
    leaves, own, _ = inputs.exact()
    lengths = inputs.kept.sum(1).tolist()
    alpha = 1.0 if loss_type == "sft" else ld_alpha
    policy = summed(own, inputs.kept, lengths, alpha).chunk(2)
    ref = summed(inputs.ref, inputs.kept, lengths, alpha).chunk(2)
    sizes = torch.tensor(lengths, dtype=torch.float64).chunk(2)
    return leaves, LOSSES[loss_type](policy[0] - ref[0], policy[1] - ref[1], policy, sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ld_alpha", [None, 0.3, 0.0])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_values_and_gradients(backend_name, served, loss_type, ld_alpha, dtype, assert_close_to_fp64):
    """Against whole logits in float64, with an upstream gradient that is not 1; NaN lies under all ignored labels."""
    served(dtype)
    inputs = Inputs(dtype)
    exact, expected = expected_losses(inputs, loss_type, 1.0 if ld_alpha is None else ld_alpha)
    leaves = inputs.leaves()
    hidden, weight, bias = leaves
    ref = (
        None
        if loss_type in ("simpo", "sft")
        else inputs.ref.to(torch.float64 if dtype == torch.float64 else torch.float32)
    )
    options = {"loss_type": loss_type, "ld_alpha": ld_alpha, "reduction": "none"}
    result = linear_preference_loss(hidden, weight, inputs.labels, ref, bias=bias, **options)
    assert_close_to_fp64(result.loss, expected, torch.float32 if dtype != torch.float64 else dtype, scale=30)
    upstream = torch.tensor([0.7, -1.0, 2.0], dtype=torch.float64)
    found = torch.autograd.grad(result.loss, leaves, upstream.to(result.loss.dtype))
    wanted = torch.autograd.grad(expected, exact, upstream)
    for grad, leaf, right in zip(found, leaves, wanted):
        assert grad.dtype == leaf.dtype
        assert_close_to_fp64(grad, torch.where(right.isnan(), 0, right), dtype, scale=30, gradient=True)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo_norm"])
def test_layouts(backend_name, loss_type):
    """Rows, flat with offsets, pairs by number in any order, hidden rows by number, references summed: the same."""
    inputs = Inputs()
    options = {"loss_type": loss_type, "ld_alpha": 0.4, "bias": inputs.bias}
    plain = linear_preference_loss(inputs.hidden, inputs.weight, inputs.labels, inputs.ref.float(), **options)
    flat = inputs.hidden.view(-1, H), inputs.weight, inputs.labels.view(-1), inputs.ref.float().view(-1)
    offsets = linear_preference_loss(*flat, cu_responses=inputs.cu, **options)
    short = linear_preference_loss(*flat, cu_responses=inputs.cu.int(), **options)
    lengths = inputs.kept.sum(1).tolist()
    refs = summed(inputs.ref, inputs.kept, lengths, 0.4).float()
    summed_refs = linear_preference_loss(inputs.hidden, inputs.weight, inputs.labels, refs, **options)
    order = torch.tensor([4, 1, 0, 3, 5, 2])  # where each response goes
    moved = [torch.empty_like(x).index_copy_(0, order, x) for x in (inputs.hidden, inputs.labels, inputs.ref.float())]
    pairs = {"chosen": order[:B], "rejected": order[B:]}
    numbered = linear_preference_loss(moved[0], inputs.weight, *moved[1:], **pairs, **options)
    kept = inputs.kept.view(-1)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    rows = kept.nonzero().view(-1)
    packed = linear_preference_loss(
        flat[0], inputs.weight, flat[2][kept], flat[3][kept], rows=rows, cu_responses=cu, **options
    )
    for other in (offsets, short, summed_refs, numbered, packed):
        torch.testing.assert_close(other.loss, plain.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.chosen_rewards, plain.chosen_rewards, rtol=1e-5, atol=1e-5)


def test_sum_of_losses_under_ld(backend_name):
    """sigmoid and sft together under ld_alpha: the likelihood counts all tokens alike."""
    inputs = Inputs()
    loss_type = [("sigmoid", 0.5), (preferences.SFT(), 2.0)]
    arguments = inputs.hidden, inputs.weight, inputs.labels
    both = linear_preference_loss(*arguments, inputs.ref.float(), bias=inputs.bias, loss_type=loss_type, ld_alpha=0.2)
    expected = 0.5 * expected_losses(inputs, "sigmoid", 0.2)[1].mean() + 2 * expected_losses(inputs, "sft")[1].mean()
    assert both.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert "rewards/accuracies" in both.metrics


def test_wpo(backend_name):
    """Weights from whole softmaxes in float64; constants to the gradient; multiplied by the caller's own."""
    inputs = Inputs()
    _, own, squares = inputs.exact()
    aligned = torch.where(inputs.kept, own - squares, 0).detach()
    weights = (aligned.sum(1) / inputs.kept.sum(1)).exp()
    torch.testing.assert_close(wpo_weights(own.detach(), squares.detach(), inputs.kept), weights)
    pairs = weights[:B] * weights[B:]
    exact, each = expected_losses(inputs, "sigmoid")
    mine = torch.tensor([1.0, 0.5, 3.0])
    leaves = inputs.leaves()
    options = {"wpo": True, "weights": mine, "bias": leaves[2]}
    result = linear_preference_loss(*leaves[:2], inputs.labels, inputs.ref.float(), **options)
    expected = (each * pairs * mine).mean()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found, wanted = torch.autograd.grad(result.loss, leaves), torch.autograd.grad(expected, exact)
    for grad, right in zip(found, wanted):
        torch.testing.assert_close(grad.double(), torch.where(right.isnan(), 0, right), rtol=1e-4, atol=1e-6)


def test_wpo_weights_of_a_certain_and_of_a_plain_policy():
    """A policy that is sure of its token has weight 1, one that is even over its vocabulary too; no token: 1."""
    even, sure = math.log(1 / 8), 0.0
    log_probs = torch.tensor([[even, even], [sure, torch.nan], [torch.nan, torch.inf]])
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]])
    torch.testing.assert_close(wpo_weights(log_probs, log_probs, mask), torch.ones(3))
    with pytest.raises(ValueError, match=r"log_sum_sq_probs has shape \[3\]"):
        wpo_weights(log_probs, torch.zeros(3), mask)


def test_unpaired(backend_name):
    """KTO takes responses by number, two desirable and three not, one of none of them."""
    inputs = Inputs()
    _, own, _ = inputs.exact()
    c = summed(own.detach() - inputs.ref, inputs.kept, inputs.kept.sum(1).tolist(), 1.0)
    good, bad = [4, 0], [1, 2, 5]
    losses = [torch.sigmoid(-0.1 * (c[i] - 0.3)) for i in good] + [torch.sigmoid(-0.1 * (0.3 - c[i])) for i in bad]
    result = linear_preference_loss(
        inputs.hidden, inputs.weight, inputs.labels, inputs.ref.float(), bias=inputs.bias, chosen=torch.tensor(good),
        rejected=torch.tensor(bad), loss_type="kto", kl=0.3, reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(result.loss.double(), torch.stack(losses), rtol=1e-5, atol=1e-6)


def test_frozen_head_and_options_of_the_head(backend_name):
    """A head that is not trained gives the same gradient of the hidden states; temperature and soft cap reach it."""
    inputs = Inputs()
    options = {"temperature": 0.7, "softcap": 3.0, "bias": inputs.bias}
    grads = []
    for trained in (True, False):
        hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_(trained)
        loss = linear_preference_loss(hidden, weight, inputs.labels, inputs.ref.float(), **options).loss
        grads.append(torch.autograd.grad(loss, hidden)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    hidden = torch.where(inputs.kept[..., None], inputs.hidden.double(), 0)
    logits = 3 * torch.tanh((hidden @ inputs.weight.double().T + inputs.bias) / 3) / 0.7
    own = logits.log_softmax(-1).gather(-1, inputs.labels.clamp(min=0)[..., None])[..., 0]
    c, r = torch.where(inputs.kept, own - inputs.ref, 0).sum(1).chunk(2)
    expected = dpo(c, r).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(4, T).long()}, r"labels has shape \[4, 7\], expected \[6, 7\]"),
        ({"ref_log_probs": torch.zeros(3)}, r"ref_log_probs has shape \[3\], expected \[6\]"),
        ({"ref_log_probs": None}, "ref_chosen_logps is None, but loss_type='sigmoid' needs"),
        ({"loss_type": "sft"}, "ref_chosen_logps is given, but .* has no reference model"),
        ({"chosen": torch.tensor([0])}, "chosen and rejected go together"),
        ({"chosen": torch.tensor([0]), "rejected": torch.tensor([1.0])}, "rejected has dtype float32"),
        ({"ld_alpha": 1.5}, "ld_alpha must be a number >= 0 and <= 1, got 1.5"),
        ({"loss_type": "kto", "kl": 0.1, "wpo": True}, "wpo is given, but the responses of loss_type='kto' belong"),
        ({"loss_type": "kto", "kl": 0.1, "ld_alpha": 0.5}, "ld_alpha is given, but the responses of loss_type='kto'"),
        ({"loss_type": "aot", "wpo": True}, "weights has no meaning for 'aot'"),
        ({"cu_responses": torch.tensor([0, 3])}, r"labels has shape \[6, 7\], expected \[\*\]"),
        ({"loss_type": "dpo"}, "loss_type must be one of"),
    ],
)
def test_bad_input(change, message):
    inputs = Inputs()
    good = {"hidden_states": inputs.hidden, "weight": inputs.weight, "labels": inputs.labels}
    with pytest.raises(ValueError, match=message):
        linear_preference_loss(**(good | {"ref_log_probs": inputs.ref.float()} | change))
    three = inputs.hidden[:3], inputs.weight, inputs.labels[:3], inputs.ref[:3].float()
    with pytest.raises(ValueError, match="labels holds 3 responses, expected an even number"):
        linear_preference_loss(*three)


@pytest.mark.parametrize("flat", [False, True])
def test_contract(backend_name, flat):
    """fullgraph compilation, the same bits twice, no gradient of the reference; an empty batch."""
    inputs = Inputs()
    options = {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5, "wpo": True}
    labels, ref = inputs.labels, inputs.ref.float()
    if flat:
        labels, ref, options = labels.view(-1), ref.view(-1), {**options, "cu_responses": inputs.cu}

    def run(hidden, weight):
        hidden = hidden.view(-1, H) if flat else hidden
        return linear_preference_loss(hidden, weight, labels, ref, **options).loss

    leaves = inputs.leaves()[:2]
    eager, compiled = run(*leaves), torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(eager, compiled) and torch.equal(run(*leaves), eager)
    for a, b in zip(torch.autograd.grad(eager, leaves), torch.autograd.grad(compiled, leaves)):
        assert torch.equal(a, b)
    nothing = torch.zeros(0, T, H, requires_grad=True)
    loss = linear_preference_loss(nothing, inputs.weight, inputs.labels[:0], inputs.ref[:0].float()).loss
    loss.backward()
    assert loss.item() == 0.0
