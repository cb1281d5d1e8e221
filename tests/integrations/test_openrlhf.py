"""The drop-in for OpenRLHF beside OpenRLHF's own functions, value and gradient, one by one."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

from rlhf_kernels.integrations import _patch, openrlhf

STUBS = str(Path(__file__).parent / "stubs")
B, T, V = 5, 9, 23


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def float_mask(interior=False):
    """1 = keep, right-padded rows of several lengths, one without a token behind its first; or with holes."""
    mask = (torch.arange(T)[None] < torch.tensor([T, 4, 1, 7, 9])[:, None]).float()
    if interior:
        mask[0, 3:5] = mask[3, 1] = 0
    return mask


def gradients(outputs, leaves):
    return torch.autograd.grad(outputs, leaves)


# Without OpenRLHF


def test_float_mask_of_zeros_and_ones_is_taken_and_a_half_refused():
    mask = torch.tensor([[1.0, 0.0]])
    assert openrlhf.kept("action_mask", mask, mask).tolist() == [[True, False]]
    assert openrlhf.kept("action_mask", None, mask).all()
    with pytest.raises(ValueError, match=r"action_mask has the entry 0\.5, expected 0 or 1"):
        openrlhf.kept("action_mask", torch.tensor([[1.0, 0.5]]), mask)
    with pytest.raises(ValueError, match="loss_mask has the entry nan"):
        openrlhf._aggregate_loss(mask, torch.tensor([[1.0, math.nan]]))


def test_log_exp_loss_is_finite_at_any_gap():
    chosen = torch.tensor([-60.0, 0.0], requires_grad=True)
    loss = openrlhf._log_exp_loss(None, chosen, torch.tensor([60.0, 0.0]))
    loss.backward()
    torch.testing.assert_close(loss.item(), (120 + math.log(2)) / 2)
    torch.testing.assert_close(chosen.grad, torch.tensor([-0.5, -0.25]))


def test_untested_version_is_refused(monkeypatch):
    monkeypatch.setattr(_patch, "version", lambda package: "0.9.0")
    with pytest.raises(RuntimeError, match=r"openrlhf is 0\.9\.0, expected .* tested with: 0\.11\.2"):
        openrlhf.enable()
    with pytest.raises(RuntimeError), openrlhf.patched():
        pass


def test_import_and_enable_load_nothing_of_the_peer(monkeypatch):
    monkeypatch.setattr(_patch, "version", lambda package: "0.11.2")
    before = {name for name in sys.modules if name.split(".")[0] == "openrlhf"}
    with openrlhf.patched():
        assert {name for name in sys.modules if name.split(".")[0] == "openrlhf"} == before


# Beside OpenRLHF


@pytest.fixture(scope="module")
def peer():
    """OpenRLHF's modules of losses and helpers."""
    pytest.importorskip("openrlhf", reason="OpenRLHF is not installed: make test-integrations-openrlhf")
    sys.path.append(STUBS)
    try:
        return importlib.import_module("openrlhf.models.loss"), importlib.import_module("openrlhf.models.utils")
    finally:
        sys.path.remove(STUBS)


def both(call, leaves):
    """The call's outputs and gradients of the first with OpenRLHF's functions and with ours."""
    found = []
    for drop_in in (False, True):
        fresh = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        if drop_in:
            with openrlhf.patched():
                out = call(*fresh)
        else:
            out = call(*fresh)
        first = out[0] if isinstance(out, tuple) else out
        upstream = torch.linspace(0.5, 2.0, first.numel(), dtype=first.dtype).view(first.shape)
        found.append((out if isinstance(out, tuple) else (out,), torch.autograd.grad(first, fresh, upstream)))
    return found


def same(call, *leaves, outputs=True, **tolerance):
    (theirs, their_grads), (ours, our_grads) = both(call, leaves)
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    for mine, wanted in zip(ours, theirs, strict=True):
        assert (mine is None) == (wanted is None)
        if wanted is not None and outputs:
            torch.testing.assert_close(mine, wanted, check_dtype=False, equal_nan=True, **tolerance)
    for mine, wanted in zip(our_grads, their_grads, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, wanted, **tolerance)


TOTALS = [{}, {"dp_size": 2, "batch_num_tokens": torch.tensor(61.0), "global_batch_size": torch.tensor(11.0)}]
AGGREGATION = pytest.mark.parametrize("totals", TOTALS, ids=["own", "global"])
LEVEL = pytest.mark.parametrize("token_level", [True, False], ids=["token", "sample"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


@AGGREGATION
@LEVEL
@DTYPES
def test_aggregate_loss(peer, totals, token_level, dtype):
    mask = float_mask().to(dtype)
    same(
        lambda x: peer[0].aggregate_loss(x, mask, token_level_loss=token_level, **totals),
        randn(B, T, dtype=dtype),
    )


OBJECTIVES = {
    "ppo": {},
    "ppo-dual": {"dual_clip": 1.5, "clip_eps_high": 0.28},
    "gspo": {"policy_loss_type": "gspo", "clip_eps_low": 3e-2, "clip_eps_high": 4e-2},
    "gspo-rollout": {"policy_loss_type": "gspo", "is_correction_level": "token"},
    "token-mask": {"is_correction_level": "token", "is_correction_threshold": [0.8, 1.25]},
    "token-clip": {
        "is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": [0.8, 1.25]
    },
    "token-tv": {
        "is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": [0.0, 0.05]
    },
    "seq-mask": {"is_correction_level": "seq", "is_correction_threshold": [0.95, 1.2]},
    "seq-binary_kl": {
        "is_correction_level": "seq", "is_correction_gating": "binary_kl", "is_correction_threshold": [0.0, 0.01]
    },
    "seq-tv": {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": [0.0, 0.09]},
}  # fmt: skip


@AGGREGATION
@LEVEL
@pytest.mark.parametrize("name", OBJECTIVES)
@DTYPES
def test_policy_loss(peer, totals, token_level, name, dtype):
    logits = randn(B, T, seed=1, dtype=dtype)
    then = logits + 0.5 * randn(B, T, seed=2, dtype=dtype)
    new, old = logits.sigmoid().log(), then.sigmoid().log()
    rollout = (then + 0.5 * randn(B, T, seed=3, dtype=dtype)).sigmoid().log()
    advantages = randn(B, 1, seed=4, dtype=dtype).expand(B, T).contiguous()
    mask = float_mask().to(dtype)
    loss = peer[0].PolicyLoss(token_level_loss=token_level, **OBJECTIVES[name])
    same(lambda x: loss(x, old, advantages, action_mask=mask, rollout_log_probs=rollout, **totals), new)
    if loss.is_correction_level != "off" and loss.policy_loss_type == "ppo":  # some are filtered, some are not
        assert 0 < loss(new, old, advantages, action_mask=mask, rollout_log_probs=rollout)[4] < 1


def test_policy_loss_without_mask(peer):
    new, old, advantages = (randn(B, T, seed=seed) for seed in (1, 2, 3))
    same(lambda x: peer[0].PolicyLoss()(x, old, advantages), new)


def test_policy_loss_beyond_the_clamp_and_under_the_mask(peer):
    """Log-ratios of 30 are held at 20; NaN under the mask makes OpenRLHF's loss NaN, and not ours."""
    old, mask = torch.full((2, 3), -40.0), torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    new = old.clone()
    new[0, 0] = -10.0
    advantages = -torch.ones(2, 3)
    same(lambda x: peer[0].PolicyLoss()(x, old, advantages, action_mask=mask), new)
    new[0, 2] = math.nan
    loss = peer[0].PolicyLoss()
    assert loss(new, old, advantages, action_mask=mask)[0].isnan()
    with openrlhf.patched():
        assert loss(new, old, advantages, action_mask=mask)[0].isfinite()


def test_half_a_mask_and_dual_clip_of_a_sequence_are_refused(peer):
    x, mask = randn(B, T), float_mask()
    mask[0, 0] = 0.5
    with openrlhf.patched():
        with pytest.raises(ValueError, match=r"action_mask has the entry 0\.5"):
            peer[0].PolicyLoss()(x, x, x, action_mask=mask)
        with pytest.raises(ValueError, match="dual_clip"):
            peer[0].PolicyLoss(policy_loss_type="gspo", dual_clip=3.0)(x, x, x, action_mask=float_mask())


@AGGREGATION
@LEVEL
@pytest.mark.parametrize("clip", [None, 0.2])
@DTYPES
def test_value_loss(peer, totals, token_level, clip, dtype):
    values, old, returns = (randn(B, T, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    mask = float_mask().to(dtype)
    loss = peer[0].ValueLoss(clip, token_level_loss=token_level)
    same(lambda x: loss(x, old, returns, action_mask=mask, **totals), values)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("margin", [False, True])
@DTYPES
def test_pair_losses(peer, shape, margin, dtype):
    chosen, rejected = randn(*shape, seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype)
    margin = randn(*shape, seed=3, dtype=dtype).abs() if margin else None
    for name in ("PairWiseLoss", "LogExpLoss"):
        same(lambda c, r, name=name: getattr(peer[0], name)()(c, r, margin), chosen, rejected)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ipo": True}], ids=str)
@DTYPES
def test_dpo_loss(peer, options, dtype):
    logps = [-20 + 3 * randn(6, seed=seed, dtype=dtype) for seed in range(4)]
    loss = peer[0].DPOLoss(0.3, **options)
    same(lambda c, r: loss(c, r, *logps[2:]), *logps[:2])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("old", [False, True])
@DTYPES
def test_compute_approx_kl(peer, estimator, unbiased, old, dtype):
    new, base = randn(B, T, seed=1), randn(B, T, seed=2)
    new[0, :4] = torch.tensor([-30.0, 30.0, -12.0, 6.0])  # beyond each of the clamps
    old = new + randn(B, T, seed=3) * 2 if old else None
    if dtype == torch.float64:
        new, base, old = new.double().float(), base, old  # OpenRLHF's arithmetic is fp32 for every dtype
    same(
        lambda x: peer[1].compute_approx_kl(
            x, base, log_probs_old=old, kl_estimator=estimator, unbiased_gradient=unbiased
        ),
        new,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@DTYPES
def test_log_probs_and_entropy(peer, temperature, dtype):
    logits, labels = 3 * randn(B, T, V, dtype=dtype), torch.arange(B * T).view(B, T) % V
    same(lambda x: peer[1].log_probs_from_logits(x * 1, labels, temperature=temperature), logits)
    own = peer[1].compute_entropy
    eager = getattr(own, "_torchdynamo_orig_callable", own)
    leaf, fresh = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    with openrlhf.patched():
        mine = peer[1].compute_entropy(leaf)
    wanted = eager(fresh)
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(out.sin().sum(), x)[0] for out, x in ((mine, leaf), (wanted, fresh))),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def maker(peer):
    """OpenRLHF's class that makes experience; its module wants vllm, for which a mock stands."""
    from unittest.mock import MagicMock

    pytest.importorskip("ray", reason="Ray is not installed")
    path = Path(peer[0].__file__).parents[1] / "trainer" / "ppo_utils" / "experience_maker.py"
    mocked = {name: MagicMock() for name in ("vllm", "openrlhf.trainer.ray", "openrlhf.trainer.ray.launcher")}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in mocked.items():
            patch.setitem(sys.modules, name, module)
        name = "openrlhf.trainer.ppo_utils.experience_maker"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        yield module.RemoteExperienceMaker


@pytest.mark.parametrize("interior", [False, True])
@pytest.mark.parametrize("discounts", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("masked", [True, False])
def test_advantages(maker, interior, discounts, masked):
    values, rewards = randn(B, T, seed=1), randn(B, T, seed=2)
    mask = float_mask(interior) if masked else None
    own = object.__new__(maker)
    wanted = own.get_advantages_and_returns(values, rewards, mask, *discounts)
    sums = own.get_cumulative_returns(rewards, mask, discounts[0])
    with openrlhf.patched():
        assert maker.get_advantages_and_returns is openrlhf._get_advantages_and_returns
        torch.testing.assert_close(own.get_advantages_and_returns(values, rewards, mask, *discounts), wanted)
        torch.testing.assert_close(own.get_cumulative_returns(rewards, mask, discounts[0]), sums)


def test_patched_reaches_those_that_imported_by_name(peer):
    models = importlib.import_module("openrlhf.models")
    own = peer[0].aggregate_loss
    assert models.aggregate_loss is own
    with openrlhf.patched():
        assert models.aggregate_loss is peer[0].aggregate_loss is openrlhf._aggregate_loss
        assert sys.modules["openrlhf.models.actor"].log_probs_from_logits is openrlhf._log_probs_from_logits
    assert models.aggregate_loss is peer[0].aggregate_loss is own


def test_in_a_worker_of_ray(peer):
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    paths = [STUBS, *(path for path in sys.path if path)]
    environment = {"PYTHONPATH": ":".join(dict.fromkeys(paths)), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    hook = {"worker_process_setup_hook": openrlhf.WORKER_SETUP_HOOK, "env_vars": environment}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=hook)
    try:

        @ray.remote
        def served():
            import openrlhf.models

            return openrlhf.models.aggregate_loss.__module__, openrlhf.models.PolicyLoss.forward.__module__

        assert set(ray.get(served.remote(), timeout=300)) == {"rlhf_kernels.integrations.openrlhf"}
    finally:
        ray.shutdown()
