"""What labels and rows the functions from hidden states take."""

import pytest
import torch

import rlhf_kernels as rk

OP = "linear"


def narrow(x):
    return x if x is None else x.int()


@pytest.mark.parametrize("rows", (None, [3, 3, 0, 1]), ids=("each row", "rows"))
def test_int32_labels_and_rows_are_int64_ones(backend_name, rows):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(4, 3, generator=generator), torch.randn(7, 3, generator=generator)
    labels, rows = torch.tensor([6, -100, 0, 2]), None if rows is None else torch.tensor(rows)
    old, advantages, mask = torch.randn(2, 4, generator=generator)[0], torch.ones(4), torch.ones(4, dtype=torch.bool)
    tokens = labels.clamp(min=0)

    def found(as_wanted):
        options = {"rows": as_wanted(rows)}
        yield rk.linear_logprobs(hidden, head, as_wanted(labels), **options)
        yield rk.linear_cross_entropy(hidden, head, as_wanted(labels), **options)
        yield rk.linear_cross_entropy(hidden, head, as_wanted(labels), reduction="none", **options)
        yield rk.linear_ppo_loss(hidden, head, as_wanted(tokens), old, advantages, mask, **options).loss
        yield rk.linear_kl(hidden, head, hidden.flip(0), head, **options)

    for ours, theirs in zip(found(narrow), found(lambda x: x)):
        assert torch.equal(ours, theirs)
