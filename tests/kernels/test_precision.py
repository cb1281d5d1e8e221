"""fp32 products are exact whatever PyTorch's switches for them say, and the switches stay as they were."""

import threading

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import _precision
from rlhf_kernels._precision import exact_products

OP = "linear"
NEWER = _precision._getter is not None
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def newer(backend, value):
    return lambda: torch._C._set_fp32_precision_setter(backend, "matmul", value)


def allow_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True


SWITCHES = {  # what a user may have turned, and whether it rounds on a CPU and on a GPU
    "nothing": (lambda: None, False, False),
    "high": (lambda: torch.set_float32_matmul_precision("high"), True, True),
    "medium": (lambda: torch.set_float32_matmul_precision("medium"), True, True),
    "allow_tf32": (allow_tf32, not NEWER, True),
}
if NEWER:
    SWITCHES["newer, of a GPU"] = (newer("cuda", "tf32"), False, True)
    SWITCHES["newer, of a CPU"] = (newer("mkldnn", "bf16"), True, False)
    SWITCHES["newer, of all"] = (lambda: torch._C._set_fp32_precision_setter("generic", "all", "tf32"), True, True)


def state():
    """All switches as they are now."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "out of step"
    names = (("cuda", "matmul"), ("mkldnn", "matmul"), ("generic", "all"), ("cuda", "conv"), ("mkldnn", "conv"))
    return [older, *(torch._C._get_fp32_precision_getter(*name) for name in names if NEWER)]


def rounds(device):
    if NEWER:
        return torch._C._get_fp32_precision_getter({"cpu": "mkldnn"}.get(device.type, "cuda"), "matmul") in (
            "tf32",
            "bf16",
        )
    return torch.get_float32_matmul_precision() != "highest"


@pytest.fixture(params=SWITCHES)
def switch(request):
    turn, on_cpu, on_gpu = SWITCHES[request.param]
    before = state()
    turn()
    yield {"cpu": on_cpu, "cuda": on_gpu}
    torch.set_float32_matmul_precision("highest")
    if NEWER:
        for backend, op in (("generic", "all"), ("cuda", "matmul"), ("mkldnn", "matmul")):
            torch._C._set_fp32_precision_setter(backend, op, "none")
    assert state() == before


@pytest.mark.parametrize("device", (CPU, CUDA), ids=str)
def test_a_block_turns_the_switch_off_and_back(switch, device):
    turned = state()
    assert rounds(device) == switch[device.type]
    for _ in range(2):
        with exact_products(device):
            assert not rounds(device)
            with exact_products(device):
                assert not rounds(device)
            assert not rounds(device)
            if not switch[device.type]:
                assert state() == turned
        assert state() == turned
    with pytest.raises(ZeroDivisionError), exact_products(device):
        raise ZeroDivisionError
    assert state() == turned


def test_two_threads(switch):
    """The first to leave turns nothing back while the other is inside."""
    turned, entered, left, found = state(), threading.Event(), threading.Event(), []

    def other():
        with exact_products(CUDA):
            entered.set()
            left.wait(10)
            found.append(rounds(CUDA))

    thread = threading.Thread(target=other)
    with exact_products(CUDA):
        thread.start()
        assert entered.wait(10)
    found.append(rounds(CUDA))
    left.set()
    thread.join()
    assert found == [False, False] and state() == turned


@pytest.fixture
def products(monkeypatch):
    """Whether fp32 products on a CPU, or the GPU's on a GPU, were rounded, one entry each."""
    seen = []

    def watched(function):
        def run(*args, **kwargs):
            tensor = next(x for x in args if isinstance(x, torch.Tensor))
            if torch.float32 in (tensor.dtype, getattr(kwargs.get("out"), "dtype", None)):
                seen.append(rounds(tensor.device))
            return function(*args, **kwargs)

        return run

    for place, name in ((torch, "mm"), (torch, "addmm"), (torch, "bmm"), (torch.Tensor, "addmm_")):
        monkeypatch.setattr(place, name, watched(getattr(place, name)))
    monkeypatch.setattr(torch.Tensor, "__matmul__", watched(torch.Tensor.__matmul__))
    return seen


def test_products_of_the_walk(backend_name, switch, products):
    """Forward and backward of log-probs, cross-entropy, PPO, KL and statistics."""
    turned = state()
    hidden, weight = torch.randn(6, 8).requires_grad_(), torch.randn(11, 8).requires_grad_()
    labels, mask = torch.arange(6), torch.ones(1, 6, dtype=torch.bool)
    numbers = torch.zeros(1, 6)
    total = rk.linear_logprobs(hidden, weight, labels).sum()
    total = total + rk.linear_cross_entropy(hidden, weight, labels)
    total = total + rk.linear_ppo_loss(hidden[None], weight, labels[None], numbers, numbers, mask).loss
    total = total + rk.linear_kl(hidden, weight, hidden.detach(), weight.detach().flip(0)).sum()
    total = total + rk.linear_token_statistics(hidden, weight, labels).entropy.sum()
    total.backward()
    assert not any(products) and state() == turned
    assert len(products) >= 12 or backend_name == "cpu"  # whose matrices are its own where they are small


def test_products_of_kept_tokens_and_distillation(switch, products):
    turned = state()
    hidden, weight = torch.randn(3, 8).requires_grad_(), torch.randn(11, 8).requires_grad_()
    kept = torch.tensor([[0, 4], [1, 2], [3, 9]])
    total = rk.linear_kept_logprobs(hidden, weight, kept[:, 0], kept).sum()
    total = total + rk.linear_jsd(hidden, weight, hidden.detach(), weight.detach().flip(0)).sum()
    total.backward()
    assert len(products) >= 4 and not any(products) and state() == turned
