"""Runs the tests that a peer ships, before and after our functions are in its place: `peer_tests.py openrlhf|verl`.

Each test file runs in a process of its own, twice; this file is also the plugin of pytest that puts our functions in.
OpenRLHF's tests load its modules by path, under names of their own, so that here the path decides what is replaced.
verl's own names get our losses and estimators too, here only: its tests ask for those by name.
"""

import functools
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = {
    "openrlhf": (
        "test_loss_aggregation.py",
        "test_kl_estimator_gradient.py",
        "test_actor_entropy_temperature.py",
        "test_reward_shaping.py",
        "test_sft_trainer.py",
        "test_pretrain_loss_mask.py",
        "test_preference_eval.py",
    ),
    "verl": (
        "trainer/ppo/test_core_algos_on_cpu.py",
        "trainer/ppo/test_loss_aggregation_on_cpu.py",
        "trainer/ppo/test_value_loss_normalization_on_cpu.py",
        "trainer/ppo/test_dynamic_policy_losses_on_cpu.py",
        "trainer/ppo/test_reinforce_pp_multiturn_on_cpu.py",
        "trainer/ppo/test_rollout_corr.py",
        "trainer/ppo/test_rollout_corr_integration.py",
    ),
}
# {peer: {test: why it may fail with our functions}}
DIFFERENT = {"openrlhf": {}, "verl": {}}


def run(peer, patched):
    """{test: outcome} of the peer's tests, and how often each of our functions was called."""
    folder = Path(importlib.util.find_spec(peer).submodule_search_locations[0]).parent
    outcomes, calls = {}, Counter()
    for name in FILES[peer]:
        with tempfile.TemporaryDirectory() as scratch:
            report = Path(scratch) / "outcomes.json"
            env = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE / "stubs"))),
                "PEER": peer,
                "PEER_PATCHED": "1" if patched else "",
                "PEER_OUTCOMES": str(report),
                "TORCHDYNAMO_DISABLE": "1",
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, "-m", "pytest", "-q", "-p", "peer_tests", "-p", "no:cacheprovider"]
            command += ["--rootdir", str(folder), "-c", os.devnull, str(folder / "tests" / name)]
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            if not report.exists():
                sys.exit(f"{name} was not run:\n{done.stdout}{done.stderr}")
            found = json.loads(report.read_text())
            failed = [test for test, outcome in found["outcomes"].items() if outcome == "failed"]
            if set(failed) - set(DIFFERENT[peer]) or not found["outcomes"]:
                print(done.stdout[-4000:])
            outcomes.update(found["outcomes"])
            calls.update(found["calls"])
    return outcomes, calls


def main(peer):
    before, _ = run(peer, False)
    after, calls = run(peer, True)
    for what, outcomes in (("its own", before), ("our", after)):
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(Counter(outcomes.values()).items()))
        print(f"{peer}'s tests with {what} functions: {counts}")
    print("called:", ", ".join(f"{name} {count}x" for name, count in sorted(calls.items())) or "nothing")
    lost = {test for test, outcome in before.items() if outcome == "passed" and after.get(test) != "passed"}
    for test in sorted(lost & DIFFERENT[peer].keys()):
        print(f"differs on purpose: {test}: {DIFFERENT[peer][test]}")
    wrong, idle = sorted(lost - DIFFERENT[peer].keys()), sorted(DIFFERENT[peer].keys() - lost)
    for test in wrong:
        print(f"LOST: {test}")
    for test in idle:
        print(f"listed as different, but it passes: {test}")
    if wrong or idle or "passed" not in before.values() or not calls:
        sys.exit(1)


# The plugin


def pytest_configure(config):
    if os.environ.get("PEER_PATCHED"):
        peer = os.environ["PEER"]
        drop_in = importlib.import_module(f"rlhf_kernels.integrations.{peer}")
        if peer == "trl":
            drop_in._Head.apply = counted(_calls, "head", drop_in._Head.apply)
            reward = importlib.import_module("rlhf_kernels.integrations._trl_reward")
            reward.pair_loss = counted(_calls, "pair loss", reward.pair_loss)
            drop_in.enable()
            return
        if peer == "verl":
            drop_in.REPLACED["verl.trainer.ppo.core_algos"].update(_under_verls_names(drop_in))
        for attributes in drop_in.REPLACED.values():
            for name, function in attributes.items():
                attributes[name] = counted(_calls, name, function)
        drop_in.enable()
        _replace_by_path(drop_in.REPLACED)


def _under_verls_names(drop_in):
    """Our losses and estimators under the names that verl's functions of them have."""
    losses = {name.replace("rk_", "compute_policy_loss_"): loss for name, loss in drop_in.LOSSES.items()}
    named = {name.replace("rk_", "compute_"): estimator for name, estimator in drop_in.ESTIMATORS.items()}
    del named["compute_gae"]  # replaced anyway
    return losses | {f"{name}_outcome_advantage": estimator for name, estimator in named.items()}


def counted(calls, name, function):
    """The function, whose calls are counted under this name."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return call


def _replace_by_path(replaced):
    """After any module of these has been executed, whatever its name, replace in it what stands for its path."""
    from rlhf_kernels.integrations._patch import places_in

    execute = importlib.machinery.SourceFileLoader.exec_module
    of_path = {name.replace(".", "/") + ".py": attributes for name, attributes in replaced.items()}

    def exec_module(self, module):
        execute(self, module)
        for path, attributes in of_path.items():
            if (module.__spec__.origin or "").endswith("/" + path):
                for holder, name, new in places_in(module, attributes):
                    setattr(holder, name, new)

    importlib.machinery.SourceFileLoader.exec_module = exec_module


_outcomes, _calls = {}, Counter()


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session):
    if path := os.environ.get("PEER_OUTCOMES"):
        Path(path).write_text(json.dumps({"outcomes": _outcomes, "calls": _calls}))


if __name__ == "__main__":
    main(sys.argv[1])
