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
