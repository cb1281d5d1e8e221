"""Advantages from groups of scores: against loops over the groups in Python, every layout, every estimator."""

import math
import os
import statistics
import subprocess
import sys
import textwrap

import pytest
import torch

from rlhf_kernels import group_advantages, masked_whiten
from rlhf_kernels.group_advantages import ESTIMATORS

IDS = [7, -3, 7, 7, 900, -3, 7, 900, 41, -3, 900]  # groups of 4, 3, 3 and 1
BY_BATCH = ("reinforce++", "reinforce++-baseline", "batch_mean")
WITH_LENGTHS = (*BY_BATCH, "opo")


def example(case, seed=0):
    """(scores fp64, the other tensors, lengths, the group of each score) of a named case; NaN under mask 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (5, 4) if case == "square" else (11,)
    scores = 3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 9, shape, generator=generator)
    if case == "square":
        return scores, {}, lengths, [p for p in range(5) for _ in range(4)]
    if case == "identities":
        return scores, {"group_ids": torch.tensor(IDS)}, lengths, IDS
    options = {"cu_groups": torch.tensor([0, 4, 4, 5, 11])}
    if case == "masked":
        options["mask"] = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1])
        scores = torch.where(options["mask"].bool(), scores, torch.nan)
    return scores, options, lengths, [0] * 4 + [2] + [3] * 6


def batch_moments(values, weights):
    """Mean and unbiased variance of values that count as often as their weights say."""
    many = [x for x, n in zip(values, weights, strict=True) for _ in range(n)]
    return statistics.fmean(many), statistics.variance(many) if len(many) > 1 else 0.0


def loop(scores, groups, keep, lengths, estimator, eps, lone):
    """The same in Python, group by group, by the standard library's statistics."""
    kept = [i for i, k in enumerate(keep) if k]
    out = dict.fromkeys(range(len(scores)), 0.0)
    for i in kept:
        own = [j for j in kept if groups[j] == groups[i]]
        of_group = [scores[j] for j in own]
        others = [scores[j] for j in own if j != i]
        if estimator in ("reinforce++", "batch_mean"):
            out[i] = scores[i]
        elif not others:
            out[i] = scores[i] if lone == "score" else 0.0
        elif estimator == "rloo":
            out[i] = scores[i] - statistics.fmean(others)
        elif estimator == "opo":
            out[i] = scores[i] - sum(lengths[j] * scores[j] for j in own) / sum(lengths[j] for j in own)
        else:
            out[i] = scores[i] - statistics.fmean(of_group)
            if estimator == "grpo":
                out[i] /= statistics.stdev(of_group) + eps
    weights = [lengths[i] for i in kept]
    if estimator == "grpo_batch_std":
        spread = statistics.stdev([scores[i] for i in kept])
        return [out[i] / (spread + eps) for i in range(len(scores))]
    if estimator in BY_BATCH:
        mean, variance = batch_moments([out[i] for i in kept], weights)
        divisor = 1.0 if estimator == "batch_mean" else math.sqrt(variance + 1e-8)
        return [(out[i] - mean) / divisor if i in kept else 0.0 for i in range(len(scores))]
    return [out[i] for i in range(len(scores))]


# 1, 2. values: against a loop in Python, and by hand


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lone", ["zero", "score"])
@pytest.mark.parametrize("case", ["square", "groups", "identities", "masked"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_values(estimator, case, lone, dtype, assert_close_to_fp64):
    scores, options, lengths, groups = example(case)
    scores = scores.to(dtype)
    keep = options.get("mask", torch.ones(len(groups))).tolist()
    flat = scores.double().flatten().tolist()
    uses = {"opo": (True,)}.get(estimator, (False, True) if estimator in BY_BATCH else (False,))
    for use in uses:
        each = lengths.flatten().tolist() if use else [1] * len(groups)
        expected = torch.tensor(loop(flat, groups, keep, each, estimator, 1e-4, lone), dtype=torch.float64)
        given = {**options, **({"lengths": lengths} if use else {})}
        found = group_advantages(scores, estimator=estimator, eps=1e-4, lone=lone, **given)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close_to_fp64(found, expected.view(scores.shape), found.dtype)


def test_reference_by_hand():
    """Scores 1, 2, 6: mean 3, unbiased std sqrt(7), the others' means 4, 3.5 and 1.5; lengths 1, 1, 2 weigh to 3.75."""
    scores = torch.tensor([[1.0, 2.0, 6.0]])
    lengths = torch.tensor([[1, 1, 2]])
    for estimator, expected in {
        "dr_grpo": [-2, -1, 3],
        "grpo": [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5],
        "rloo": [-3, -1.5, 4.5],
        "batch_mean": [-2, -1, 3],
        "reinforce++": [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5],
        "opo": [-2.75, -1.75, 2.25],
    }.items():
        options = {"lengths": lengths} if estimator == "opo" else {}
        found = group_advantages(scores, estimator=estimator, eps=0.0, **options)
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float32))


@pytest.mark.parametrize("estimator", ["reinforce++", "reinforce++-baseline"])
def test_reference_lengths_whiten_over_tokens(estimator):
    """As verl: each score tiled over its tokens, whitened over all of them; gaps and padding between."""
    scores, options, lengths, _ = example("identities")
    centred = scores if estimator == "reinforce++" else group_advantages(scores, estimator="dr_grpo", **options)
    mask = torch.arange(9) < lengths[:, None]
    tokens = masked_whiten(centred[:, None].expand(11, 9), mask)
    found = group_advantages(scores, estimator=estimator, lengths=lengths, **options)
    torch.testing.assert_close(torch.where(mask, found[:, None], 0.0), tokens, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_reference_layouts_agree(estimator):
    """Rows of a matrix, offsets, and identities in any order are the same groups."""
    scores, _, lengths, groups = example("square")
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([1000 - 7 * g for g in groups])
    given = {"lengths": lengths} if estimator in WITH_LENGTHS else {}
    flat = {name: x.flatten() for name, x in given.items()}
    square = group_advantages(scores, estimator=estimator, **given).flatten()
    offsets = group_advantages(scores.flatten(), torch.arange(0, 24, 4), estimator=estimator, **flat)
    torch.testing.assert_close(offsets, square, rtol=1e-13, atol=1e-13)
    for dtype in (torch.int64, torch.int32, torch.int16):
        options = {"group_ids": ids[shuffled].to(dtype), **{name: x[shuffled] for name, x in flat.items()}}
        found = group_advantages(scores.flatten()[shuffled], estimator=estimator, **options)
        torch.testing.assert_close(found, square[shuffled], rtol=1e-13, atol=1e-13)


RANK = textwrap.dedent("""
    import sys, torch, torch.distributed as dist
    from rlhf_kernels import group_advantages
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    scores, ids, mask = torch.load(f"{folder}/inputs.pt")
    options = {"process_group": dist.group.WORLD}
    half = slice(rank * 6, rank * 6 + 6)
    found = [group_advantages(scores[half], group_ids=ids[half], mask=mask[half], estimator=e, **options)
             for e in ("grpo", "rloo", "reinforce++-baseline", "grpo_batch_std")]
    rows = scores.view(6, 2)[:2] if rank == 0 else scores.view(6, 2)[2:]
    found += [group_advantages(rows, estimator=e, **options).flatten() for e in ("reinforce++-baseline", "batch_mean")]
    torch.save(found, f"{folder}/out{rank}.pt")
    del options  # a group that outlives its destruction may abort the process at its end
    dist.barrier()
    dist.destroy_process_group()
""")


def test_reference_two_ranks_are_one_batch(tmp_path):
    """Groups that lie on both ranks by their ids; rows of a matrix, not as many on each, by the batch's moments."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(12, generator=generator) + torch.arange(12)
    ids, mask = torch.tensor([5, 9, 5, 5, 9, 2, 2, 5, 9, 9, 2, 5]), torch.rand(12, generator=generator) < 0.8
    torch.save([scores, ids, mask], tmp_path / "inputs.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    together = [torch.cat(parts) for parts in zip(*(torch.load(tmp_path / f"out{rank}.pt") for rank in range(2)))]
    names = ("grpo", "rloo", "reinforce++-baseline", "grpo_batch_std")
    alone = [group_advantages(scores, group_ids=ids, mask=mask, estimator=name) for name in names]
    alone += [
        group_advantages(scores.view(6, 2), estimator=e).flatten() for e in ("reinforce++-baseline", "batch_mean")
    ]
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    first = group_advantages(scores[:6], group_ids=ids[:6], mask=mask[:6])
    assert (first - alone[0][:6]).abs().max() > 0.1, "the example would not notice groups that end with their rank"


# 3. gradients: there are none


@pytest.mark.parametrize("case", ["square", "identities"])
def test_gradients_are_cut(case):
    scores, options, *_ = example(case)
    assert not group_advantages(scores.requires_grad_(), **options).requires_grad


# 4. masked garbage


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -3e38])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_masked_garbage(estimator, garbage):
    """Nor does it count: the others get what they get without the masked members."""
    scores, options, lengths, groups = example("masked")
    keep = options["mask"].bool()
    given = {"lengths": lengths.double().masked_fill(~keep, garbage)} if estimator in WITH_LENGTHS else {}
    dirty = scores.masked_fill(~keep, garbage)
    found = group_advantages(dirty, estimator=estimator, **options, **given)
    assert (found[~keep] == 0).all()
    ids = torch.tensor(groups)[keep]
    without = group_advantages(
        scores[keep], group_ids=ids, estimator=estimator, **{name: x[keep] for name, x in given.items()}
    )
    torch.testing.assert_close(found[keep], without, rtol=1e-13, atol=1e-13)


# 5. edges


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_edges(estimator):
    """No group, no member, nothing kept, equal scores, one member, another order of the strides."""
    of = {"lengths": torch.ones(0)} if estimator == "opo" else {}
    for options in (
        {"cu_groups": torch.tensor([0])},
        {"cu_groups": torch.tensor([0, 0])},
        {"group_ids": torch.ones(0).int()},
    ):
        assert group_advantages(torch.zeros(0), estimator=estimator, **options, **of).shape == (0,)
    for shape in ((0, 4), (3, 0), (3, 1), (3, 4)):
        lengths = {"lengths": torch.ones(shape)} if estimator == "opo" else {}
        same = group_advantages(torch.full(shape, 2.5), estimator=estimator, **lengths)
        assert same.shape == shape and (same == 0).all()
        nothing = torch.zeros(shape, dtype=torch.bool)
        masked = group_advantages(torch.full(shape, torch.nan), estimator=estimator, mask=nothing, **lengths)
        assert masked.shape == shape and (masked == 0).all()
    scores, _, lengths, _ = example("square")
    given = {"lengths": lengths} if estimator in WITH_LENGTHS else {}
    strided = {name: x.t().contiguous().t() for name, x in given.items()}
    found = group_advantages(scores.t().contiguous().t(), estimator=estimator, **strided)
    torch.testing.assert_close(found, group_advantages(scores, estimator=estimator, **given), rtol=1e-14, atol=1e-14)


# 6. bad input

SIX, ROWS = torch.zeros(6), torch.zeros(2, 3)


@pytest.mark.parametrize(
    "scores,options,words",
    [
        (SIX.long(), {}, "scores has dtype int64"),
        (torch.zeros(1, 2, 3), {}, "scores has shape [1, 2, 3], expected [P, K]"),
        (SIX, {}, "scores is [S], and neither of cu_groups and group_ids is given"),
        (SIX, {"cu_groups": torch.tensor([0, 6]), "group_ids": SIX.int()}, "each of cu_groups and group_ids is given"),
        (ROWS, {"cu_groups": torch.tensor([0, 6])}, "scores is [P, K], whose groups are its rows"),
        (SIX, {"cu_groups": torch.tensor([0, 4])}, "cu_groups ends with 4, expected 6"),
        (SIX, {"cu_groups": torch.tensor([0.0, 6.0])}, "cu_groups has dtype float32"),
        (SIX, {"group_ids": SIX}, "group_ids has dtype float32"),
        (SIX, {"group_ids": torch.zeros(5).int()}, "group_ids has shape [5], expected [6]"),
        (ROWS, {"mask": torch.ones(2, 2).int()}, "mask has shape [2, 2]"),
        (ROWS, {"estimator": "gae"}, "estimator must be one of 'grpo', "),
        (ROWS, {"eps": -1.0}, "eps must be a number >= 0, got -1.0"),
        (ROWS, {"lone": "one"}, "lone must be one of 'zero', 'score', got 'one'"),
        (ROWS, {"estimator": "opo"}, "lengths is None, but estimator='opo' weighs the scores by them"),
        (ROWS, {"lengths": ROWS}, "lengths is given, but estimator='grpo' weighs all responses alike"),
        (ROWS, {"lengths": SIX, "estimator": "opo"}, "lengths has shape [6]"),
        (ROWS, {"mask": torch.ones(2, 3, device="meta").int()}, "mask is on meta"),
    ],
)
def test_bad_input(scores, options, words):
    with pytest.raises(ValueError) as error:
        group_advantages(scores, **options)
    assert words in str(error.value)


# 7. contract


@pytest.mark.parametrize("case", ["square", "groups", "identities"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_contract_fullgraph_and_same_bits(estimator, case):
    scores, options, lengths, _ = example(case)
    options = {**options, "estimator": estimator} | ({"lengths": lengths} if estimator in WITH_LENGTHS else {})
    plain = group_advantages(scores.float(), **options)
    assert torch.equal(group_advantages(scores.float(), **options), plain)
    torch._dynamo.reset()  # each case is a function of its own to the compiler, which counts them
    compiled = torch.compile(group_advantages, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores.float(), **options), plain)


def test_contract_opcheck():
    values = torch.randn(2, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index = torch.tensor([3, 1, 3, 3, 0, 1, 3, 0, 2, 1, 0])
    torch.library.opcheck(torch.ops.rlhf_kernels.group_sums.default, (values, index))


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "dr_grpo"])
def test_contract_groups_do_not_know_each_other(estimator):
    """A group gives the same bits alone, and among others in any order."""
    generator = torch.Generator().manual_seed(2)
    scores, ids = torch.randn(500, generator=generator), torch.randint(0, 40, (500,), generator=generator)
    whole = group_advantages(scores, group_ids=ids, estimator=estimator)
    for group in range(0, 40, 7):
        mine = ids == group
        assert torch.equal(group_advantages(scores[mine], group_ids=ids[mine], estimator=estimator), whole[mine])
