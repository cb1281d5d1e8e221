"""The drop-in for verl beside verl's own functions, value and gradient, one by one; and its registries."""

import importlib
import logging
import math
import os
import subprocess
import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_kernels.integrations import _patch, verl

B, T, V, H = 6, 9, 23, 7
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
GLOBAL = {"dp_size": 2, "batch_num_tokens": 61, "global_batch_size": 11, "loss_scale_factor": 13}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mask_of(dtype):
    """1 = keep; rows of several lengths, one of them with a hole, as after a tool's answer."""
    mask = (torch.arange(T)[None] < torch.tensor([T, 4, 1, 7, 9, 3])[:, None]).to(dtype)
    mask[0, 3:5] = 0
    return mask


# Without verl

CORE = "verl.trainer.ppo.core_algos"


@pytest.fixture
def core(monkeypatch):
    """A module in the place of verl's, with two names in its registries."""
    made = ModuleType(CORE)
    made.POLICY_LOSS_REGISTRY = {"vanilla": len, "rk_gspo": abs}
    made.ADV_ESTIMATOR_REGISTRY = {"gae": len}
    monkeypatch.setattr(verl, "version", lambda package: "0.9.1")
    monkeypatch.setitem(sys.modules, CORE, made)
    return made


def test_register_adds_names_and_replaces_none(core, caplog):
    with caplog.at_level(logging.INFO):
        verl.register()
        verl.register()
    assert core.POLICY_LOSS_REGISTRY["vanilla"] is len and core.POLICY_LOSS_REGISTRY["rk_gspo"] is abs
    assert "rk_gspo is not added" in caplog.text
    assert core.POLICY_LOSS_REGISTRY.keys() == {"vanilla"} | verl.LOSSES.keys()
    assert core.ADV_ESTIMATOR_REGISTRY.keys() == {"gae"} | verl.ESTIMATORS.keys()


@pytest.mark.parametrize("wrong", ["no registry", "version", "not installed"])
def test_register_says_what_is_wrong_and_goes_on(core, monkeypatch, caplog, wrong):
    if wrong == "no registry":
        del core.POLICY_LOSS_REGISTRY
    elif wrong == "version":
        monkeypatch.setattr(verl, "version", lambda package: "0.4.0")
    else:
        monkeypatch.undo()
        monkeypatch.setattr(verl, "version", lambda package: (_ for _ in ()).throw(ImportError("no verl")))
    with caplog.at_level(logging.INFO):
        verl.register()
    assert "rk_ names are not added" in caplog.text


def test_register_waits_for_verls_module(monkeypatch, tmp_path):
    monkeypatch.setattr(verl, "version", lambda package: "0.9.1")
    monkeypatch.setattr(verl, "_CORE", "rk_core_algos_on_disk")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    (tmp_path / "rk_core_algos_on_disk.py").write_text("POLICY_LOSS_REGISTRY, ADV_ESTIMATOR_REGISTRY = {}, {}\n")
    verl.register()
    assert "rk_core_algos_on_disk" not in sys.modules
    made = importlib.import_module("rk_core_algos_on_disk")
    monkeypatch.delitem(sys.modules, "rk_core_algos_on_disk")
    assert made.POLICY_LOSS_REGISTRY.keys() == verl.LOSSES.keys()


def test_untested_version_is_refused(monkeypatch):
    monkeypatch.setattr(_patch, "version", lambda package: "0.8.0")
    with pytest.raises(RuntimeError, match=r"verl is 0\.8\.0, expected .* tested with: 0\.9\.1"):
        verl.enable()


def test_kl_behind_a_clamp_is_finite():
    for name in ("k3", "k3+", "low_var_kl", "low_var_kl+"):
        for gap in (-100.0, 100.0):
            log_prob = torch.tensor([gap], requires_grad=True)
            kl = verl._kl_penalty(log_prob, torch.zeros(1), name)
            kl.backward()
            assert kl.item() == 10
            assert log_prob.grad.item() == (gap if name.endswith("+") else 0)


def test_kl_of_an_unknown_name_is_refused():
    with pytest.raises(NotImplementedError, match="kl_penalty must be one of"):
        verl._kl_penalty(torch.zeros(1), torch.zeros(1), "full")


def test_gae_without_values_says_what_to_do():
    with pytest.raises(ValueError, match="adv_estimator=gae"):
        verl._gae(token_level_rewards=torch.zeros(1, 2), response_mask=torch.ones(1, 2), config=SimpleNamespace())


def test_several_ranks_need_the_global_count():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="batch_num_tokens is None, but dp_size=2"):
        verl._compute_value_loss(x, x, x, torch.ones(1, 2), 0.2, dp_size=2)


# Beside verl


@pytest.fixture(scope="module")
def peer():
    pytest.importorskip("verl", reason="verl is not installed: make test-integrations-verl")
    return importlib.import_module(CORE)


@pytest.fixture(scope="module")
def functional(peer):
    return importlib.import_module("verl.utils.torch_functional")


@pytest.fixture(scope="module")
def config_of(peer):
    actor = importlib.import_module("verl.workers.config.actor")

    def config(info, policy=None, **options):
        policy = actor.PolicyLossConfig(dro_beta=0.3, kl_cov_ratio=0.2, ppo_kl_coef=0.7, **(policy or {}))
        made = actor.ActorConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy, **options
        )
        made.global_batch_info.update(info)
        return made

    return config


def compare(theirs, ours, leaves, rtol=1e-5, atol=1e-6):
    """Value and gradients of two functions of fresh copies of the leaves; gives what both return."""
    results, outs = [], []
    for function in (theirs, ours):
        fresh = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        out = function(*fresh)
        outs.append(out)
        first = out[0] if isinstance(out, tuple) else out
        upstream = torch.linspace(0.5, 2.0, first.numel(), dtype=first.dtype).view(first.shape)
        results.append([first.detach(), *torch.autograd.grad(first, fresh, upstream)])
    for wanted, mine in zip(*results, strict=True):
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(mine, wanted, check_dtype=False, rtol=rtol, atol=atol)
    return outs


def patched(function):
    def call(*leaves):
        with verl.patched():
            return function(*leaves)

    return call


LOSSES = [name for name in verl.LOSSES if name != "rk_clip_cov"]  # which draws tokens at random


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["own", "global"])
@DTYPES
def test_policy_losses(peer, config_of, name, mode, info, dtype):
    logits = randn(B, T, seed=1, dtype=dtype)
    new, old = logits.sigmoid().log(), (logits + 0.6 * randn(B, T, seed=2, dtype=dtype)).sigmoid().log()
    advantages = randn(B, 1, seed=3, dtype=dtype).expand(B, T).contiguous()
    narrow = name in ("rk_gspo", "rk_dppo_tv", "rk_dppo_kl", "rk_geo_mean")
    clip = {"clip_ratio_low": 0.03, "clip_ratio_high": 0.05} if narrow else {"clip_ratio_high": 0.28}
    config = config_of(info, clip_ratio_c=1.5, **clip)
    own = getattr(peer, name.replace("rk_", "compute_policy_loss_"))
    for weights in (None, randn(B, T, seed=4, dtype=dtype).abs()):
        (_, wanted), (_, mine) = compare(
            *(
                lambda x, loss=loss, weights=weights: loss(
                    old, x, advantages, mask_of(dtype), mode, config, rollout_is_weights=weights
                )
                for loss in (own, verl.LOSSES[name])
            ),
            [new],
        )
        assert mine.keys() == wanted.keys()
        for key, number in mine.items():
            assert isinstance(number, torch.Tensor) and number.dim() == 0 and not number.requires_grad
            if name != "rk_geo_mean" or key == "actor/ppo_kl":  # its clipped tokens are counted otherwise
                assert math.isclose(number.item(), wanted[key], rel_tol=1e-4, abs_tol=1e-6), key


def test_clip_cov_drops_as_many_tokens(peer, config_of):
    """Which ones is drawn at random in both: with every candidate drawn, none is left to chance."""
    new, advantages = -randn(B, T, seed=1).abs(), 3 * randn(B, T, seed=3)
    old = new + 0.1 * randn(B, T, seed=2)
    config = config_of({}, policy={"clip_cov_ratio": 1.0, "clip_cov_lb": 0.5, "clip_cov_ub": 50.0})
    (_, wanted), (_, mine) = compare(
        *(
            lambda x, loss=loss: loss(old, x, advantages, mask_of(torch.float32), "token-mean", config)
            for loss in (peer.compute_policy_loss_clip_cov, verl.LOSSES["rk_clip_cov"])
        ),
        [new],
    )
    assert mine.keys() == wanted.keys() and wanted["actor/pg_clipfrac"] > 0
    for key in wanted:
        assert math.isclose(mine[key].item(), wanted[key], rel_tol=1e-5)


def test_policy_loss_is_written_to_in_place_as_verl_does(config_of):
    new = randn(B, T).requires_grad_()
    mask = mask_of(torch.int64)
    loss, _ = verl.LOSSES["rk_vanilla"](new.detach(), new, randn(B, T, seed=1), mask, "token-mean", config_of({}))
    loss -= 0.1 * (new * mask).sum()
    loss.backward()
    assert new.grad.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["own", "global"])
@DTYPES
def test_value_loss(peer, mode, info, dtype):
    values, old, returns = (randn(B, T, seed=seed, dtype=dtype) for seed in (1, 2, 3))

    def call(x):
        return peer.compute_value_loss(x, returns, old, mask_of(dtype), 0.3, loss_agg_mode=mode, **info)

    (_, wanted), (_, mine) = compare(call, patched(call), [values])
    torch.testing.assert_close(mine, wanted, check_dtype=False)


@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
@pytest.mark.parametrize("plus", ["", "+"])
@DTYPES
def test_kl_penalty(peer, name, plus, dtype):
    new, ref = randn(B, T, seed=1, dtype=dtype), randn(B, T, seed=2, dtype=dtype)
    new[0, :2] += torch.tensor([-6.0, 8.0])  # where k3 is held at 10, and where not
    compare(
        lambda x: peer.kl_penalty(x, ref, name + plus), patched(lambda x: peer.kl_penalty(x, ref, name + plus)), [new]
    )


@pytest.mark.parametrize("shape", [(B, T), (B * T,)], ids=["padded", "packed"])
@DTYPES
def test_from_logits(functional, shape, dtype):
    logits = 3 * randn(*shape, V, dtype=dtype)
    labels = torch.arange(B * T).view(shape) % V
    calls = [
        lambda x: functional.logprobs_from_logits(x * 1, labels),
        lambda x: functional.logprobs_from_logits(x, labels, inplace_backward=False),
        lambda x: functional.entropy_from_logits(x),
    ]
    if len(shape) == 1 and dtype == torch.float32:  # verl's sums are fp32
        calls.append(lambda x: functional.entropy_from_logits_with_chunking(x, chunk_size=5))
    for call in calls:
        compare(call, patched(call), [logits])
    wanted = functional.calculate_sum_pi_squared_from_logits(logits)
    with verl.patched():
        torch.testing.assert_close(functional.calculate_sum_pi_squared_from_logits(logits), wanted)


@pytest.mark.parametrize("shape", [(B, T), (B * T,)], ids=["padded", "packed"])
@pytest.mark.parametrize("which", [0, 1], ids=["log_probs", "entropy"])
def test_fused_linear(peer, shape, which):
    module = importlib.import_module("verl.utils.experimental.torch_functional")
    hidden, head = randn(*shape, H, seed=1), randn(V, H, seed=2)
    labels = torch.arange(B * T).view(shape) % V

    def call(h, w):
        return module.FusedLinearForPPO(chunk_size=16)(h, w, labels, temperature=0.7)[which]

    def exact(h, w):
        logits = h.double() @ w.double().T / 0.7
        log_probs = logits.log_softmax(-1)
        if which:
            return -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    compare(call, patched(call), [hidden, head], rtol=1e-5, atol=1e-5)  # verl's are off by 4e-6 of fp64's
    compare(exact, patched(call), [hidden, head])
    with verl.patched():  # verl takes one temperature for all
        warmth = torch.full(shape, 0.7)
        found = module.FusedLinearForPPO()(hidden, head, labels.int(), temperature=warmth)[which]
    torch.testing.assert_close(found, call(hidden, head), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_gae(peer, dtype):
    """Advantages and returns of the kept tokens; verl's returns go on under the mask, where nothing reads them."""
    rewards, values, mask = randn(B, T, seed=1), randn(B, T, seed=2), mask_of(dtype)
    wanted = peer.compute_gae_advantage_return(rewards, values, mask, 0.9, 0.8)
    with verl.patched():
        mine = peer.compute_gae_advantage_return(rewards, values, mask, 0.9, 0.8)
    for own, ours in zip(wanted, mine, strict=True):
        torch.testing.assert_close(ours[mask.bool()], own[mask.bool()], rtol=1e-5, atol=1e-5)
    named = verl.ESTIMATORS["rk_gae"](
        token_level_rewards=rewards, values=values, response_mask=mask, config=SimpleNamespace(gamma=0.9, lam=0.8)
    )
    torch.testing.assert_close(named, mine)


ESTIMATORS = sorted(verl.ESTIMATORS.keys() - {"rk_gae"})


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("by_std", [True, False])
def test_estimators(peer, name, by_std):
    rewards, mask = randn(B, T, seed=1), mask_of(torch.int64)
    rewards = rewards * mask
    index = np.array(["a", "b", "a", "alone", "b", "a"], dtype=object)
    config = importlib.import_module("verl.trainer.config").AlgoConfig(gamma=0.9, norm_adv_by_std_in_grpo=by_std)
    options = {"config": config, "index": index}
    own = getattr(peer, name.replace("rk_", "compute_") + "_outcome_advantage")
    extra = {"norm_adv_by_std_in_grpo": by_std} if name == "rk_grpo" else {}
    wanted = own(token_level_rewards=rewards.clone(), response_mask=mask, **options, **extra)
    mine = verl.ESTIMATORS[name](token_level_rewards=rewards, response_mask=mask, **options)
    for theirs, ours in zip(wanted, mine, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_registered_beside_verls_own(peer):
    losses, estimators = dict(peer.POLICY_LOSS_REGISTRY), dict(peer.ADV_ESTIMATOR_REGISTRY)
    verl.register()
    for registry, before in ((peer.POLICY_LOSS_REGISTRY, losses), (peer.ADV_ESTIMATOR_REGISTRY, estimators)):
        assert {name: registry[name] for name in before} == before
    assert peer.get_policy_loss_fn("rk_cispo") is verl.LOSSES["rk_cispo"]
    assert peer.get_adv_estimator_fn("rk_grpo") is verl.ESTIMATORS["rk_grpo"]


def test_entry_point(peer):
    if not any(point.value == "rlhf_kernels.integrations._verl_plugin" for point in entry_points(group="verl.plugins")):
        pytest.skip("this package is not installed, so that verl does not find its entry point")
    script = (
        "import verl.trainer.ppo.core_algos as core\n"
        "print(sorted(name for name in core.POLICY_LOSS_REGISTRY if name.startswith('rk_')))\n"
        "print(core.kl_penalty.__module__)"
    )
    for plugins, names in (("auto", sorted(verl.LOSSES)), ("none", [])):
        env = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": plugins}
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-2:] == [str(names), CORE]
