"""The op `linear` in training: autocast, loss scales, accumulation, chunks that add up, shards of the vocabulary."""

import pytest
import torch
import torch.nn.functional as F

import rlhf_kernels as rk
from rlhf_kernels.reference.logprobs import logprobs_and_entropy
from tests.conftest import GPU

OP = "linear"


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_autocast(backend_name, assert_close_to_fp64):
    """Under autocast the products are of bf16 inputs, as F.linear's, and everything after them is fp32."""
    hidden, head, labels = normal(8, 16).requires_grad_(), normal(40, 16, seed=1).requires_grad_(), torch.arange(8)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, head)]
    truth = F.cross_entropy(F.linear(*rounded), labels)
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        loss = rk.linear_cross_entropy(hidden, head, labels)
        per_token = rk.linear_logprobs(hidden.bfloat16(), head, labels)
        grads = torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(-per_token.mean(), (hidden, head))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(truth.item(), rel=1e-6)
    for pair in grads:
        for grad, wanted in zip(pair, torch.autograd.grad(truth, rounded, retain_graph=True)):
            if backend_name == "triton":
                assert_close_to_fp64(grad, wanted, torch.bfloat16, gradient=True)
            else:
                torch.testing.assert_close(grad, wanted.float(), atol=1e-4, rtol=2**-7)
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16), rk.backend("reference"):
        assert rk.linear_logprobs(hidden.double(), head.double(), labels).dtype == torch.float64


def test_fp16_gradients_survive_a_loss_scale(backend_name):
    """Gradients made in the forward wait in fp32: in fp16 they would be 0 before the loss scale arrives."""
    hidden, head = (1e-4 * normal(4, 6)).half().requires_grad_(), normal(11, 6, seed=1).half().requires_grad_()
    loss = rk.linear_cross_entropy(hidden, head, torch.arange(4), num_items_in_batch=4096)
    (2.0**16 * loss).backward()
    assert (head.grad != 0).float().mean() > 0.9


@pytest.mark.slow_interpreted
def test_trap_10_mean_of_means(backend_name):
    """10 tokens of 1 nat and 200 of 3: the mean of means is 2.0, the mean over tokens 2.90; gradients add up."""
    head = torch.zeros(2, 1)
    hidden = [torch.full((10, 1), 1.0), torch.full((200, 1), 3.0)]
    head[0] = -1.0  # log p(0) is close to -hidden; solve for exactly 1 and 3 nats
    hidden = [torch.log(torch.expm1(x)) for x in hidden]
    labels = [torch.zeros(len(x), dtype=torch.int64) for x in hidden]
    means = [rk.linear_cross_entropy(x, head, y).item() for x, y in zip(hidden, labels)]
    assert sum(means) / 2 == pytest.approx(2.0, abs=1e-5)
    head.requires_grad_()
    parts = sum(rk.linear_cross_entropy(x, head, y, num_items_in_batch=210) for x, y in zip(hidden, labels))
    whole = rk.linear_cross_entropy(torch.cat(hidden), head, torch.cat(labels))
    assert parts.item() == pytest.approx(2.9048, abs=1e-4) and whole.item() == pytest.approx(2.9048, abs=1e-4)
    torch.testing.assert_close(torch.autograd.grad(parts, head), torch.autograd.grad(whole, head))


def test_trap_25_bf16_hidden_states(backend_name):
    """From bf16 hidden states the log-probs are those of exact products; bf16 logits lose 0.01 and more."""
    hidden, head = normal(64, 64, dtype=torch.bfloat16), normal(4096, 64, dtype=torch.bfloat16, seed=1) * 0.3
    labels = torch.arange(64)
    truth = torch.log_softmax(hidden.double() @ head.double().t(), -1)[labels, labels]
    ours = rk.linear_logprobs(hidden, head, labels)
    naive = torch.log_softmax(hidden @ head.t(), -1)[labels, labels]
    assert (ours - truth).abs().max() < 2e-5
    assert (naive - truth).abs().mean() > 0.01


@pytest.mark.slow_interpreted
def test_trap_26_chunk_products(backend_name):
    """The sum over chunks is in fp32: rounding each chunk's product to bf16 is 5 times worse, and ours has no bias."""
    hidden, head = normal(512, 16, dtype=torch.bfloat16), normal(64, 16, dtype=torch.bfloat16, seed=1)
    labels = torch.randint(0, 64, (512,), generator=torch.Generator().manual_seed(0))
    head.requires_grad_()
    (ours,) = torch.autograd.grad(rk.linear_cross_entropy(hidden, head, labels, reduction="sum", chunk_size=4), head)
    wide = head.detach().double().requires_grad_()
    p = torch.softmax(hidden.double() @ wide.t(), -1)
    dlogits = (p - F.one_hot(labels, 64)).detach()
    truth = dlogits.t() @ hidden.double()
    rounded = torch.zeros_like(head)
    for rows in torch.arange(512).split(4):
        rounded += (dlogits[rows].t() @ hidden[rows].double()).bfloat16()
    residual = ours.double() - truth
    if backend_name == "triton":  # where d/dlogits is rounded before the product
        assert residual.norm() <= 2**-8 * truth.norm()
    else:
        assert (residual.abs() <= 2**-8 * truth.abs() + 1e-5).all()
    assert (rounded.double() - truth).norm() > 5 * residual.norm()
    assert residual.mean().abs() < 3 * residual.std() / residual.numel() ** 0.5


@pytest.mark.slow_interpreted
def test_trap_26_fifty_steps(backend_name):
    """Fifty steps on chunks of 4 tokens follow full logits in float64: the entropy drifts by less than 1e-3 nats.

    In Triton's interpreter, where each chunk takes 40 ms, of 16 tokens.
    """
    size = 16 if backend_name == "triton" and not GPU else 4
    labels = torch.randint(0, 64, (128,), generator=torch.Generator().manual_seed(0))
    start, hidden = normal(64, 16, seed=1), normal(128, 16, seed=2).bfloat16()
    ours, full = start.clone(), start.double()
    for _ in range(50):
        leaf = ours.bfloat16().requires_grad_()
        (grad,) = torch.autograd.grad(rk.linear_cross_entropy(hidden, leaf, labels, chunk_size=size), leaf)
        ours -= 2.0 * grad.float()
        leaf = full.bfloat16().double().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(hidden.double() @ leaf.t(), labels), leaf)
        full -= 2.0 * grad
    logits = (hidden.double() @ w.double().t() for w in (start, ours, full))
    before, after, wanted = (logprobs_and_entropy(x)[1].mean() for x in logits)
    assert (after - before).abs() > 0.1, "the fifty steps must move the entropy for the test to mean something"
    assert (after - wanted).abs() < 1e-3


@pytest.mark.parametrize(
    ("backend", "cuts"),
    [
        ("cpu", "6"),
        ("reference", "5,6"),
        *(
            pytest.param(*cuts, marks=pytest.mark.slow)
            for cuts in (("cpu", "5"), ("cpu", "4,8"), ("cpu", "5,6"), ("triton", "5"))
        ),
    ],
)
def test_vocabulary_parallel(gloo_ranks, backend, cuts):
    """Two and three gloo ranks with equal and unequal shards agree with the head in one piece, forward and backward."""
    state = rk.backends()["linear"][backend]
    if state != "available" or (backend == "triton" and torch.cuda.is_available()):
        pytest.skip("the ranks run on CPU tensors" if state == "available" else f"{backend} {state}")
    gloo_ranks("linear_ranks.py", cuts.count(",") + 2, cuts, backend)
