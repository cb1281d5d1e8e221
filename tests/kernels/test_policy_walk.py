"""The walk of policy_loss itself: what a backend provides, and tokens beyond what a thread, a warp or a block takes."""

import pytest
import torch

from rlhf_kernels import KLTerm, dispatch
from rlhf_kernels.reference import policy as reference
from tests.kernels.test_policy import OBJECTIVES, compare, inputs, ours

OP = "policy"


@pytest.mark.parametrize("case", reference.CASES)
def test_the_backends_contract(backend_name, case, assert_close_to_fp64):
    """policy_fwd itself: any mix of policy, KL, weights, values and entropy, against the definition in float64."""
    arguments = reference.example_inputs(case, dtype=torch.float32)
    backend = dispatch.pick("policy", arguments["tensors"].log_probs)
    tensors = arguments["tensors"]
    wide = [None if x is None else x.double() if x.is_floating_point() else x for x in tensors]
    parts = {"all": tensors}
    if tensors.values is not None:
        policy = ("log_probs", "old_log_probs", "advantages", "ref_log_probs", "weights", "coefficients")
        parts["values and entropy"] = tensors._replace(**dict.fromkeys(policy))
    for part in parts.values():
        exact = [None if x is None else y for x, y in zip(part, wide, strict=True)]
        wanted = reference.policy_fwd(reference.Tensors(*exact), arguments["settings"])
        found = backend.policy_fwd(part, arguments["settings"])
        for x, y in zip(found[:-1], wanted[:-1], strict=True):
            assert x.dtype == torch.float32 and x.shape == y.shape
            assert_close_to_fp64(x, y, torch.float32, 4)
        torch.testing.assert_close(found[-1], wanted[-1].float(), rtol=2e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shape", [(5, 260), (3, 1501), pytest.param((40, 1801), marks=pytest.mark.slow_interpreted)])
@pytest.mark.parametrize("name", ("clip", "gspo", "gmpo"))
def test_many_tokens(backend_name, name, shape, assert_close_to_fp64):
    """Rows and batches longer than what a thread, a warp or a block takes; a row's gradient has no part of others'."""
    case, options = inputs(seed=16, shape=shape), {"kl": KLTerm(0.3), "weighted": True, "entropy_coef": 0.2}
    compare(case, torch.float32, assert_close_to_fp64, OBJECTIVES[name], "seq-mean-token-mean", **options)
    _, whole, _ = ours(case, OBJECTIVES[name], "token-sum", kl=options["kl"], weighted=True)
    _, alone, _ = ours(
        {x: t[2:3] for x, t in case.items()}, OBJECTIVES[name], "token-sum", kl=options["kl"], weighted=True
    )
    assert torch.equal(whole[2:3], alone)


@pytest.fixture
def few_programs(monkeypatch):
    """Triton's programs take as many pieces as they may: 8 of 1024 tokens."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    from rlhf_kernels.triton import policy

    monkeypatch.setattr(policy, "PROGRAMS", 1)
    with dispatch.backend("triton"):
        yield policy


def test_a_program_of_several_pieces(few_programs, assert_close_to_fp64):
    """Two programs, of 8 pieces and of 4 and a part; 1500 tokens are dropped before the first kept one, and more
    between. Squares of returns around 1000 lose no digits."""
    arguments = reference.example_inputs("everything", dtype=torch.float32)
    generator = torch.Generator().manual_seed(17)
    shape = 3, 4101
    tensors = {
        name: None if x is None else torch.randn(shape, generator=generator, dtype=torch.float32)
        for name, x in arguments["tensors"]._asdict().items()
    }
    mask = torch.rand(shape, generator=generator, dtype=torch.float32) < 0.7
    mask[0, :1500] = False
    tensors |= {"mask": mask, "returns": 1000 + tensors["returns"], "values": 1000.3 + tensors["values"]}
    tensors |= {"normalizer": None, "entropy_normalizer": None}
    tensors = reference.Tensors(**tensors)
    exact = [None if x is None else x.double() if x.is_floating_point() else x for x in tensors]
    assert few_programs.pieces(mask.numel(), few_programs.PIECE * few_programs.ROUNDS) == 2
    wanted = reference.policy_fwd(reference.Tensors(*exact), arguments["settings"])
    garbage = [
        torch.where(mask, x, torch.nan) if x is not None and x.shape == shape and x.is_floating_point() else x
        for x in tensors
    ]
    for found in (few_programs.policy_fwd(tensors, arguments["settings"]),
                  few_programs.policy_fwd(reference.Tensors(*garbage), arguments["settings"])):  # fmt: skip
        for x, y in zip(found[:-1], wanted[:-1], strict=True):
            assert_close_to_fp64(x, y, torch.float32, 4)
        torch.testing.assert_close(found[-1], wanted[-1].float(), rtol=2e-5, atol=1e-6, equal_nan=True)


def test_equal_numbers_have_no_variance(few_programs):
    """Exactly, in several lanes, pieces and programs of which some keep 1, 2 or 3 tokens of 4."""
    generator = torch.Generator().manual_seed(18)
    mask = torch.rand(2, 5000, generator=generator, dtype=torch.float32) < 0.5
    same = torch.full(mask.shape, 0.1, dtype=torch.float32)
    found = few_programs.policy_fwd(
        reference.Tensors(mask, 3.7 * same, same, same, values=7.3 * same, old_values=same, returns=9.1 * same),
        reference.Settings(),
    )
    stats = dict(zip(reference.STATS, found[-1].tolist(), strict=True))
    assert stats["ratio_var"] == 0.0 and stats["tokens"] == mask.sum()
    assert stats["explained_variance"] != stats["explained_variance"]  # 0 / 0
