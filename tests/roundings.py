"""How far two computations of the same thing may lie apart on any processor: bounds that follow from their roundings.

Another processor, or a batch of another shape, sums the products of a matrix in another order. In fp32 that moves the
results of a network of two layers by up to 1e-5. So what compares networks across batches, ranks, forms or runs does
it in float64 (`dtype="float64"`, `model.double()`): such sums agree to 1e-13, and a mistake shows as it would in fp32.
"""

import torch

EXACT = 2**20 * 2**-53
"""1e-10: float64 from end to end, with 20 binary digits to spare for what cancels or grows."""

STORED = 16 * 2**-24
"""1e-6: float64 with some numbers of fp32 on the way, each rounded once: old log-probs, values and scores are stored
so, and the norms of Llama and its kin compute so, whatever the weights' type."""


def assert_same(actual, expected, bound=STORED):
    """Largest difference <= bound * the larger of 1 and the largest expected entry; NaN is never accepted."""
    actual, expected = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    if expected.numel():
        error, limit = (actual - expected).abs().max(), bound * expected.abs().max().clamp(min=1)
        assert error <= limit, f"off by {error:.3g}, {error / limit:.3g} times the bound {limit:.3g}"
