"""What the caller writes over results of one number a row, before their backward, is a constant."""

import pytest
import torch

from tests.kernels.calls import GPU, ON_BACKENDS, build, differentiated, serving, upstream_of

ROWS = (
    "logprobs_from", "logprobs_and", "entropy_from", "kl_from", "linear_logprobs", "linear_kl", "approx_kl",
    "token_statistics", "linear_token",
)  # fmt: skip
CALLS = [
    pytest.param(
        name, backend, marks=[pytest.mark.slow] if backend == "triton" and "linear" in name and not GPU else []
    )
    for name, backend in ON_BACKENDS
    if name.startswith(ROWS)
]


def gradients(call, write):
    """Of the leaves, after `write(x, places)` has put something else into some places of each result."""
    leaves = [x.clone().requires_grad_() for x in call.leaves]
    outputs = differentiated(call.function(*leaves))
    places = [torch.arange(x.numel(), device=x.device).view(x.shape) % 2 == 1 for x in outputs]
    written = [write(x, some) for x, some in zip(outputs, places)]
    return torch.autograd.grad(written, leaves, [upstream_of(x) for x in written], allow_unused=True)


def over(x, places):
    x[places] = 7.0
    x += 1.0
    return x


@pytest.mark.parametrize(("name", "backend"), CALLS)
def test_results_may_be_written_in_place(name, backend):
    with serving(backend):
        call = build()[name]
        apart = gradients(call, lambda x, places: torch.where(places, 7.0, x) + 1.0)
        assert any(x is not None and x.any() for x in apart)
        for found, expected in zip(gradients(call, over), apart):
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)
