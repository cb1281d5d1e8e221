"""The benchmark of other trainers' steps, at tiny sizes: all implementations of a step give the same, tables say so."""

import copy
import importlib.util
import sys

import pytest
import torch

from benchmarks import before_after, cases, peer_steps
from benchmarks import test_integrations as measured
from benchmarks.cases import Skip

CASES = [case.tiny() for case in measured.CASES]
for case in CASES:
    case.sizes |= {"B": 4} if "B" in case.sizes else {}  # TRL wants pairs of rows


def need(case):
    peer = case.function.partition("_")[0]
    if importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed: make test-integrations")
    return peer


def facts(case):
    return {"function": case.function, "dtype": case.dtype, "variant": case.variant, "sizes": case.sizes}


def results(step, impl):
    """What the step returns and the gradients of the model's parameters."""
    gradients = {}
    handles = [
        p.register_post_accumulate_grad_hook(lambda p, name=name: gradients.__setitem__(name, p.grad.detach().clone()))
        for name, p in (step.model.named_parameters() if step.model is not None else ())
    ]
    with step.contexts[impl]():
        found = step.run()
    for handle in handles:
        handle.remove()
    return (found if isinstance(found, tuple) else (found,)), gradients


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.group)
def test_a_step_is_the_same_with_and_without(case):
    """Loss and every gradient; what stands in for no head at all runs, and reaches every weight."""
    peer = need(case)
    try:
        step = peer_steps.STEPS[case.function](facts(case))
    except ImportError as error:  # as where `make bench` has put a peer without what it requires
        pytest.skip(f"{peer} cannot be imported here: {error}")
    assert case.impls[0] == "ours" and set(case.impls) <= set(step.contexts)
    assert step.labelled is None or 0 < step.labelled < 1
    weights = copy.deepcopy(step.model.state_dict()) if step.model is not None else None
    wanted, their_gradients = results(step, peer)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if case.dtype == "fp32" else {"rtol": 0.1, "atol": 0.02}
    for impl in case.impls:
        if weights is not None:  # as before the peer's step
            step.model.load_state_dict(weights)
        found, gradients = results(step, impl)
        assert all(torch.isfinite(x).all() for x in found)
        assert gradients.keys() == their_gradients.keys()
        if impl == "backbone":
            continue
        for x, y in zip(found, wanted, strict=True):
            if x is not None and case.function != "verl_gae":  # whose results under the mask differ on purpose
                torch.testing.assert_close(x, y, check_dtype=False, **tolerance)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, their_gradients[name], check_dtype=False, **tolerance)


def test_a_process_answers_turns_and_failures(monkeypatch):
    """Of the first peer that this python has; without one the answer is why not."""
    monkeypatch.setenv(measured.PYTHONS, sys.executable)
    monkeypatch.setattr(measured, "_processes", {})
    try:
        for case in CASES:
            step = measured.build(case).calls["ours"]
            if importlib.util.find_spec(case.function.partition("_")[0]) is None:
                with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
                    step.first()
                continue
            found, peak = step.first()
            assert found["threads"] == 1 or found["clock"] == "wall"
            assert peak is None or peak >= 0
            assert all(seconds >= 0 for seconds in step.turn())
            step.asked["impl"] = "nobody"
            with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
                step.turn()
            break
    finally:
        measured._end()


def test_a_peer_that_is_not_there_is_a_reason(monkeypatch):
    monkeypatch.delenv(measured.PYTHONS, raising=False)
    rows = cases.measure(CASES[0])
    reason = f"{measured.PYTHONS} names no python with trl"
    assert rows == {impl: {"skipped": reason} for impl in CASES[0].impls}
    monkeypatch.setenv(measured.PYTHONS, "/nowhere-{}/bin/python")
    assert measured.peer_python("verl") == Skip("there is no environment with verl: make bench-integrations")


def group(function, dtype, shape="8x9", **rows):
    rows = {name: {"ms": ms, "peak_mib": ms / 10} for name, ms in rows.items()}
    rows = {name.replace("_", "-"): row for name, row in rows.items()}
    return {"op": "integrations", "function": function, "dtype": dtype, "shape": shape, "rows": rows}


GROUPS = [
    group("trl_sft", "fp32", ours=300.0, trl_labels=700.0, trl=1500.0, backbone=100.0),
    group("trl_sft", "bf16", ours=200.0, ours_fast=150.0, trl_labels=600.0, trl=1200.0, backbone=100.0),
    group("verl_actor", "fp32", ours=100.0, verl=250.0),
    {**group("ppo_loss", "fp32", ours=1.0), "op": "ppo"},
]


def test_tables():
    """By hand: 700 / 300, and (700 - 100) / (300 - 100)."""
    lines = before_after.page(GROUPS)
    assert "| SFT, fp32 | 300 | 2.33 × | 5 × | 3 ×, 7 × | 10, 30, 70, 150 |" in lines
    assert "| SFT, bf16, fast | 150 | 4 × | 8 × | 10 ×, 22 × | 10, 15, 60, 120 |" in lines
    assert "| `verl_actor`, fp32 | 8x9 | 100 | 2.5 × | 10, 25 |" in lines
    assert not any("ppo_loss" in line for line in lines)
    assert before_after.short_table(GROUPS)[-3:] == [
        "| TRL as it is takes | 5 ×; 8 × |",
        "| TRL on labels alone takes | 2.33 ×; 4 × |",
        "| MiB, fp32: ours, labels, as it is | 30, 70, 150 |",
    ]
    skipped = [{**GROUPS[0], "rows": {name: {"skipped": "no TRL"} for name in GROUPS[0]["rows"]}}]
    assert before_after.page(skipped) == before_after.short_table(skipped) == []
