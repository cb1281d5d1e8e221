"""The demo, whose PPO samples on a server of vLLM that is killed in the middle: `make demo-vllm [SEEDS="0 1 2"]`.

For each seed: the demo's three stages in a process of their own; in the middle of PPO's samples SIGKILL to the server
and its workers, and another start. Then a line of what came out, and at the end whether all of it is as it should be.
It has its own labeler, rankings and reward model for each seed, as `rlhf demo --seed` has.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.vllm.serving import ROOT, UNTIED, Server

GAP = 1e-3  # nats a token, mean of an iteration
KILLED_AFTER = 5  # iterations of 12


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def wait_for(condition, process) -> None:
    """Return once the condition holds, or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.01)


def run(seed: int, folder: Path, server: Server) -> dict:
    """The demo of a seed through the server, which is killed and started again meanwhile."""
    command = [
        sys.executable, "-m", "rlhf", "demo", "--seed", str(seed), "--output_dir", str(folder), "--rollout_engine",
        "vllm", "--vllm_server", server.url,
    ]  # fmt: skip
    metrics, killed = folder / "ppo" / "metrics.jsonl", None
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    wait_for(lambda: len(rows(metrics)) >= KILLED_AFTER, process)
    before = server.asked("/inference/v1/generate")
    wait_for(lambda: server.asked("/inference/v1/generate") > before + 8, process)
    if process.poll() is None:
        killed = {"after_iteration": len(rows(metrics)), "answers": server.asked("/inference/v1/generate") - before}
        server.kill()
        time.sleep(2)
        server.start()
    code = process.wait()
    found = {"seed": seed, "exit": code, "killed": killed}
    if code == 0:
        policies = json.loads((folder / "evaluation.json").read_text())["policies"]
        for name in ("ppo", "ppo_ptx"):
            steps = rows(folder / name / "metrics.jsonl")
            found[name] = {
                "policy": next(policy for policy in policies if policy["name"].lower().replace("-", "_") == name),
                "iterations": len(steps), "gap": max(step["rollout/logprob_gap_mean"] for step in steps),
                "largest_gap": max(step["rollout/logprob_gap_max"] for step in steps),
            }  # fmt: skip
    return found


def good(found: dict) -> bool:
    """Whether the server was killed in a rollout, and both policies win over SFT, beyond interval and gap."""
    return (found["exit"], bool(found["killed"])) == (0, True) and all(
        found[name]["policy"]["win_rate"]["low"] > 0.5 and found[name]["gap"] < GAP for name in ("ppo", "ppo_ptx")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo-vllm"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as logs:
        server = Server(Path(logs), *UNTIED)
        try:
            server.wait()
            found = [run(seed, args.output_dir / f"seed-{seed}", server.wait()) for seed in args.seeds]
        finally:
            server.kill()
    (args.output_dir / "found.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    wrong = [seed["seed"] for seed in found if not good(seed)]
    print(f"seeds {wrong} are not as they should be" if wrong else f"{len(found)} seeds are as they should be")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
