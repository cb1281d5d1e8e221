"""How many nodes a step would have as a CUDA graph: kernels of ours, fills of memory, and PyTorch's own kernels.

Counted without a GPU: ours where they are launched (by tests/cuda_on_cpu, or for Triton's interpreter), PyTorch's as
the operators that reach it, but for those that only make views or memory.
"""

import ctypes

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import rlhf_kernels as rk
from rlhf_kernels import _checks, _native, _presence, bradley_terry, dispatch, policy, ppo

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "unbind", "lift_fresh"}
WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}


@pytest.fixture(autouse=True)
def poisoned_empty():
    """Nothing is filled here but by the ops."""


class Counted(TorchDispatchMode):
    """Collects the operators that would launch a kernel; our own are entered, and what they call is counted."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in OPDEFS:
            with self:
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        plain = name.partition("::")[2]
        assert plain not in WAITS, f"{plain} waits for the device"
        results = function(*args, **(kwargs or {}))
        nothing = isinstance(results, torch.Tensor) and results.numel() == 0
        if not (function.is_view or plain in MEMORY or nothing):
            self.operators.append(plain)
        return results


@pytest.fixture(params=("cuda", "triton"))
def backend(request):
    missing = _presence.missing(request.param)
    if missing is not None:
        pytest.skip(f"{request.param} is missing: {missing}")
    return request.param


def launches(backend, monkeypatch):
    """A function that returns how many kernels and fills of ours have been launched."""
    if backend == "cuda":
        count = ctypes.c_int64.in_dll(ctypes.CDLL(_native._load_cuda()[0].__file__), "cuda_on_cpu_nodes")
        return lambda: count.value
    from rlhf_kernels.triton import _launch

    launched, run = [], _launch.run

    def recorded(kernel, *args, **options):
        launched.append(kernel)
        with _disable_current_modes():  # the interpreter is made of operators too
            run(kernel, *args, **options)

    monkeypatch.setattr(_launch, "run", recorded)
    return lambda: len(launched)


def nodes(call, backend, monkeypatch):
    """(kernels and fills of ours, PyTorch's operators) of one call, as on a GPU, where no value is read."""
    for module in (_checks, ppo, policy, bradley_terry):
        monkeypatch.setattr(module, "reads_values", lambda tensor: False)
    count = launches(backend, monkeypatch)
    before = count()
    with dispatch.backend(backend), Counted() as counted:
        call()
    return count() - before, counted.operators


def tokens(count):
    return [torch.randn(4, 50) for _ in range(count)], torch.ones(4, 50, dtype=torch.bool)


def ppo_step():
    (new, old, advantages, values, old_values, returns), mask = tokens(6)
    new.requires_grad_(), values.requires_grad_()

    def step():
        targets = {"values": values, "old_values": old_values, "returns": returns}
        rk.ppo_loss(new, old, advantages, mask, **targets).loss.backward()

    return step


def policy_step():
    (new, old, advantages, ref), mask = tokens(4)
    new.requires_grad_()

    def step():
        rk.policy_loss(new, old, advantages, mask, ref_log_probs=ref, kl=rk.KLTerm(0.1)).loss.backward()

    return step


def value_step():
    (values, old, returns), mask = tokens(3)
    values.requires_grad_()

    def step():
        rk.value_loss(values, old, returns, mask).loss.backward()

    return step


@pytest.mark.parametrize("step", (ppo_step, policy_step, value_step))
def test_a_loss_of_tokens_is_four_nodes_or_five(step, backend, monkeypatch):
    """The mask's count, the walk, in Triton its end, autograd's 1, and the product of the backward."""
    ours, operators = nodes(step(), backend, monkeypatch)
    assert (ours, operators) == (4 if backend == "triton" else 3, ["ones_like"])


@pytest.mark.parametrize("losses", (rk.bradley_terry_loss, rk.plackett_luce_loss))
def test_a_ranking_loss_is_four_nodes(losses, backend, monkeypatch):
    """The pairs, loss and metrics (in CUDA a counter's zero and both in one), autograd's 1, the backward's product."""
    scores, ranks = torch.randn(20, 9).requires_grad_(), torch.arange(9).expand(20, 9).contiguous()
    ours, operators = nodes(lambda: losses(scores, ranks).loss.backward(), backend, monkeypatch)
    assert (ours, operators) == (3, ["ones_like"])
