"""Aggregation of a loss of each token: against loops over sequences, and as trainers call it."""

import math

import pytest
import torch

from rlhf_kernels import aggregate_loss
from rlhf_kernels.reference.ppo import AGG_MODES

MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])


def example(dtype=torch.float64):
    """A loss of each token, NaN where it is masked."""
    loss = torch.randn(MASK.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.where(MASK.bool(), loss, torch.nan).to(dtype)


def loop(loss, mask, mode, items=None, width=None):
    """The same by Python's floats, sequence by sequence."""
    rows = [[x for x, keep in zip(*row) if keep] for row in zip(loss.tolist(), mask.tolist())]
    rows = [row for row in rows if row]
    if mode == "token-sum":
        return math.fsum(x for row in rows for x in row)
    if mode == "token-mean":
        return math.fsum(x for row in rows for x in row) / (items or sum(map(len, rows)))
    of_row = {
        "seq-mean-token-sum": math.fsum,
        "seq-mean-token-mean": lambda row: math.fsum(row) / len(row),
        "seq-mean-token-sum-norm": lambda row: math.fsum(row) / (width or mask.shape[1]),
    }[mode]
    return math.fsum(map(of_row, rows)) / (items or len(rows))


# 1, 2. values: against a loop in Python, and by hand


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", AGG_MODES)
def test_values(mode, dtype, assert_close_to_fp64):
    loss = example(dtype)
    found = aggregate_loss(loss, MASK, loss_agg_mode=mode)
    assert found.shape == () and found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = torch.tensor(loop(loss.double(), MASK, mode), dtype=torch.float64)
    assert_close_to_fp64(found, exact, torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("mode", [mode for mode in AGG_MODES if mode != "token-sum"])
@pytest.mark.parametrize("items", [7, 2.5, torch.tensor(7)], ids=str)
def test_values_by_the_number_of_the_whole_batch(mode, items):
    found = aggregate_loss(example(), MASK, loss_agg_mode=mode, num_items_in_batch=items)
    assert found.item() == pytest.approx(loop(example(), MASK, mode, float(items)), rel=1e-12)


def test_values_of_one_width_for_all_batches():
    options = {"loss_agg_mode": "seq-mean-token-sum-norm", "num_items_in_batch": 4, "loss_scale_factor": 8}
    expected = loop(example(), MASK, "seq-mean-token-sum-norm", items=4, width=8)
    assert aggregate_loss(example(), MASK, **options).item() == pytest.approx(expected, rel=1e-12)
    wider = torch.nn.functional.pad(example(), (0, 3)), torch.nn.functional.pad(MASK, (0, 3))
    assert aggregate_loss(*wider, **options).item() == pytest.approx(expected, rel=1e-12)


def test_reference_by_hand():
    """Tokens 1, 2 | 6: their mean is 3; sequences of sums 3 and 6, of means 1.5 and 6."""
    loss, mask = torch.tensor([[1.0, 2.0], [6.0, 99.0]]), torch.tensor([[1, 1], [1, 0]])
    expected = {"token-mean": 3.0, "token-sum": 9.0, "seq-mean-token-sum": 4.5, "seq-mean-token-mean": 3.75}
    expected["seq-mean-token-sum-norm"] = 2.25
    assert {mode: aggregate_loss(loss, mask, loss_agg_mode=mode).item() for mode in AGG_MODES} == expected


# 3. gradients


@pytest.mark.parametrize("mode", AGG_MODES)
def test_gradients(mode):
    """That of a kept token is its weight, whatever the loss; parts of a batch add up to the whole."""
    loss = torch.where(MASK.bool(), example(), 0.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: aggregate_loss(x, MASK, loss_agg_mode=mode), loss)
    whole = torch.autograd.grad(3.0 * aggregate_loss(loss, MASK, loss_agg_mode=mode), loss)[0]
    items = {"token-sum": None, "token-mean": MASK.sum()}.get(mode, MASK.any(1).sum())
    parts = [aggregate_loss(loss[i], MASK[i], loss_agg_mode=mode, num_items_in_batch=items) for i in ([0, 2], [1, 3])]
    torch.testing.assert_close(torch.autograd.grad(3.0 * sum(parts), loss)[0], whole, rtol=1e-12, atol=0)


# 4. masked garbage


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
def test_masked_garbage(mode, garbage):
    loss = example().nan_to_num(garbage, posinf=garbage).requires_grad_()
    found = aggregate_loss(loss, MASK, loss_agg_mode=mode)
    assert found.item() == pytest.approx(loop(example(), MASK, mode), rel=1e-12)
    (gradient,) = torch.autograd.grad(found, loss)
    assert gradient.isfinite().all() and (gradient[MASK == 0] == 0).all() and (gradient[MASK == 1] > 0).all()


# 5. edges


@pytest.mark.parametrize("mode", AGG_MODES)
def test_edges(mode):
    """Nothing at all, nothing kept, one token, other strides, packed tokens."""
    for shape in ((0, 5), (3, 0), (2, 4)):
        nothing = torch.full(shape, math.nan, requires_grad=True)
        found = aggregate_loss(nothing, torch.zeros(shape, dtype=torch.bool), loss_agg_mode=mode)
        assert found.item() == 0 and torch.autograd.grad(found, nothing)[0].eq(0).all()
    assert aggregate_loss(torch.tensor([[2.0]]), torch.tensor([[True]]), loss_agg_mode=mode).item() == 2.0
    strided = aggregate_loss(example().t().contiguous().t(), MASK.t().contiguous().t(), loss_agg_mode=mode)
    assert torch.equal(strided, aggregate_loss(example(), MASK, loss_agg_mode=mode))
    if mode.startswith("token-"):
        packed = aggregate_loss(example()[MASK.bool()], torch.ones(7, dtype=torch.bool), loss_agg_mode=mode)
        assert packed.item() == pytest.approx(loop(example(), MASK, mode), rel=1e-12)


# 6. bad input


@pytest.mark.parametrize(
    "arguments,options,words",
    [
        ((torch.zeros(2, 3).long(), torch.ones(2, 3).bool()), {}, "loss has dtype int64"),
        ((torch.zeros(2, 3), torch.ones(2, 4).bool()), {}, "mask has shape"),
        ((torch.zeros(2, 3, 1), torch.ones(2, 3, 1).bool()), {}, "loss has shape [2, 3, 1], expected [B, T]"),
        ((torch.zeros(3), torch.ones(3).bool()), {"loss_agg_mode": "seq-mean-token-sum"}, "loss has shape [3]"),
        ((torch.zeros(2, 3), MASK[:2, :3]), {"loss_agg_mode": "mean"}, "loss_agg_mode must be one of 'token-mean'"),
        ((torch.zeros(2, 3), MASK[:2, :3]), {"num_items_in_batch": 0}, "num_items_in_batch must be a number > 0"),
        (
            (torch.zeros(2, 3), MASK[:2, :3]),
            {"num_items_in_batch": 2, "loss_agg_mode": "token-sum"},
            "num_items_in_batch has no meaning",
        ),
        ((torch.zeros(2, 3), MASK[:2, :3]), {"loss_scale_factor": 4}, "loss_scale_factor is given, but loss_agg_mode="),
        (
            (torch.zeros(2, 3), MASK[:2, :3]),
            {"loss_scale_factor": 0, "loss_agg_mode": "seq-mean-token-sum-norm"},
            "loss_scale_factor must be a number > 0",
        ),
    ],
)
def test_bad_input(arguments, options, words):
    with pytest.raises(ValueError) as error:
        aggregate_loss(*arguments, **options)
    assert words in str(error.value)


# 7. contract


@pytest.mark.parametrize("mode", AGG_MODES)
def test_contract(mode):
    """One graph, the same bits twice, all derivatives."""
    loss = torch.where(MASK.bool(), example(torch.float32), 0.0).requires_grad_()
    plain = aggregate_loss(loss, MASK, loss_agg_mode=mode)
    compiled = torch.compile(aggregate_loss, fullgraph=True, backend="aot_eager")(loss, MASK, loss_agg_mode=mode)
    for found in (compiled, aggregate_loss(loss, MASK, loss_agg_mode=mode)):
        assert torch.equal(found, plain)
        assert torch.equal(*(torch.autograd.grad(x, loss, retain_graph=True)[0] for x in (found, plain)))
    exact = torch.where(MASK.bool(), example(), 0.0).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: aggregate_loss(x.exp(), MASK, loss_agg_mode=mode), exact)
