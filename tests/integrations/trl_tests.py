"""Runs the tests of TRL's trainers with our functions in their place: `trl_tests.py CHECKOUT [NAME ...]`.

TRL ships no tests, so CHECKOUT is a clone of huggingface/trl; its tiny models and data sets are made from its own
scripts, without the Hub. What fails is run again with TRL's functions: what passes then is lost, and the status is 1.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parents[2] / "shared" / "tools" / "peers"
TRAINERS = ("sft", "dpo", "kto", "grpo", "rloo", "reward")
LEFT_OUT = "not vlm and not VLM and not vision and not image"  # these take models that the stand-in of the Hub lacks
# {test: why it may fail with our functions}
DIFFERENT: dict[str, str] = {}


def pytest(folder, checkout, patched, tests):
    """{test: outcome} of these tests or files, and how often our head was called."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "outcomes.json"
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(HERE), str(TOOLS))),
            "PEER": "trl",
            "PEER_PATCHED": "1" if patched else "",
            "PEER_OUTCOMES": str(report),
            "TRL_SNAPSHOT": str(checkout),
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-k", LEFT_OUT]
        command += ["-p", "trl_hub_plugin", "-p", "peer_tests", "--basetemp", str(Path(scratch) / "tests"), *tests]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if not report.exists():
            sys.exit(f"{' '.join(tests)} was not run:\n{done.stdout}{done.stderr}")
        found = json.loads(report.read_text())
        return found["outcomes"], found["calls"], done.stdout


def compare(folder, checkout, name):
    """Of one test file: (outcomes with ours, outcomes of what failed with TRL's own functions, calls, output)."""
    after, calls, output = pytest(folder, checkout, True, [f"tests/test_{name}_trainer.py"])
    failed = [test for test, outcome in after.items() if outcome == "failed"]
    before = pytest(folder, checkout, False, failed)[0] if failed else {}
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(Counter(after.values()).items()))
    print(f"{name}: {counts}; {sum(calls.values())} calls of our functions", flush=True)
    return after, before, calls, output


def main(checkout, names):
    if not (checkout / "tests").is_dir() or not (checkout / "scripts").is_dir():
        sys.exit(f"{checkout} is no clone of TRL's repository: it has no tests/ or no scripts/")
    if not TOOLS.is_dir():
        sys.exit(f"{TOOLS} is missing: it makes the models that TRL's tests load")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copytree(checkout / "tests", folder / "tests")  # not beside its trl, which the tests would import
        made = [sys.executable, str(TOOLS / "make_fake_hub.py"), str(checkout), str(folder / "hub")]
        done = subprocess.run(made, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        if done.returncode:
            sys.exit(f"the models of TRL's tests were not made:\n{done.stdout}{done.stderr}")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(lambda name: compare(folder, checkout, name), names))
    after, before, calls, output = {}, {}, Counter(), ""
    for of_file in found:
        after.update(of_file[0])
        before.update(of_file[1])
        calls.update(of_file[2])
        output += of_file[3][-20000:]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(Counter(after.values()).items()))
    failed = Counter(before.values())["failed"]
    print(f"TRL's trainer tests with our functions: {counts}; {failed} of the failed ones fail with TRL's own too")
    print("called:", ", ".join(f"{name} {count}x" for name, count in sorted(calls.items())) or "nothing")
    lost = {test for test, outcome in before.items() if outcome != "failed"}
    for test in sorted(lost & DIFFERENT.keys()):
        print(f"differs on purpose: {test}: {DIFFERENT[test]}")
    wrong, idle = sorted(lost - DIFFERENT.keys()), sorted(DIFFERENT.keys() - lost) if names == TRAINERS else []
    for test in wrong:
        print(f"LOST: {test}")
    for test in idle:
        print(f"listed as different, but it passes: {test}")
    if wrong:
        print(output)
    if wrong or idle or "passed" not in after.values() or not calls:
        sys.exit(1)


if __name__ == "__main__":
    if importlib.util.find_spec("trl") is None:
        sys.exit("the package trl is not installed: make test-integrations-trl")
    main(Path(sys.argv[1]).resolve(), tuple(sys.argv[2:]) or TRAINERS)
