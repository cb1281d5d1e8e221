"""Seconds of PPO's phases under the built-in sampler, transformers' generate and a server of vLLM, in turns.

    .venv-vllm/bin/python -m tests.vllm.phases demo      # or 135M: SmolLM-135M's shape, random weights

A run of each engine, and again; of each run the first iteration, in which much is done for the first time, is left out.
The server shares the machine's cores with the trainer, and waits while the trainer computes.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.scale_run import PROMPTS, SHAPES, write_models
from rlhf import data
from rlhf.ppo import PPOConfig, PPOTrainer
from tests.vllm.serving import UNTIED, Server

ENGINES = ("builtin", "generate", "vllm")
PHASES = ("rollout", "score", "evaluate", "update")
TURNS, ITERATIONS = 2, 4


def measure(folder: Path, out: str, server: Server, engine: str, responses: int) -> list[dict]:
    options = {"rollout_engine": engine} | ({"vllm_server": [server.url]} if engine == "vllm" else {})
    PPOTrainer(PPOConfig(
        sft_model_path=str(folder / "policy"), reward_model_path=str(folder / "reward"),
        dataset_name=str(folder / "prompts.jsonl"), output_dir=str(folder / out), rollout_batch_size=responses,
        per_device_train_batch_size=responses // 2, response_length=53, num_ppo_epochs=1, max_steps=ITERATIONS,
        save_steps=0, disable_tqdm=True, on_health="ignore", **options,
    )).train()  # fmt: skip
    return [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--responses", type=int, default=64, help="an iteration")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        write_models(SHAPES[args.shape], folder)
        rows = data.load_rows(PROMPTS, "prompts")[: 2 * args.responses]
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
        server = Server(folder, "--model", str(folder / "policy"), "--max-model-len", "256", *UNTIED)
        found = {engine: [] for engine in ENGINES}
        try:
            server.wait()
            for turn in range(TURNS):
                for engine in ENGINES:
                    found[engine] += measure(folder, f"{engine}-{turn}", server, engine, args.responses)
        finally:
            server.kill()
    print(f"{args.shape}, {args.responses} responses, {torch.get_num_threads()} threads; medians of seconds")
    print(f"| engine | tokens of a response | {' | '.join(PHASES)} | all |")
    for engine, steps in found.items():
        times = [statistics.median(step[f"time/{phase}"] for step in steps) for phase in PHASES]
        length = statistics.mean(step["completions/mean_length"] for step in steps)
        print(f"| {engine} | {length:.1f} | {' | '.join(f'{x:.3g}' for x in (*times, sum(times)))} |", flush=True)


if __name__ == "__main__":
    main()
