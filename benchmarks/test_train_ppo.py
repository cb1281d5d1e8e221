"""One PPO iteration, from the prompts to the last optimizer step, beside TRL 1.12's PPOTrainer, the last that TRL made.

Each trainer runs in a process of its own (benchmarks/ppo_iteration.py), TRL in an environment of its own, since the
other peers need a newer TRL: RLHF_KERNELS_TRL112_PYTHON names its python (requirements-trl-1.12.txt says what is in
it). Both have as many threads, the same transformers models in fp32, the same prompts, all of them in each iteration,
and the same settings: batch, epochs, one minibatch, learning rate, lengths, temperature, KL and clipping. The value
network starts from the reward model, which is the policy's trunk under a random head; EOS ends a response.

What is left to differ is each trainer's own way. Ours computes the old log-probs by the code that trains, where TRL
takes them from the sampler. TRL computes each response to the longest one's end, with the logits of the prompts, and
masks afterwards; ours leaves finished rows and most of the padding out, and never holds the logits. Samples are random:
the two have the same distribution of lengths, not the same responses. Memory is how far two iterations, with their
gradients and optimizer states, raise the resident memory over that of the loaded models.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import roof
from benchmarks.cases import Bench, Case, Skip, faster, memory
from benchmarks.worker import Worker
from rlhf import data, models

TRL = "RLHF_KERNELS_TRL112_PYTHON"
DEMO = Path(models.DEMO_MODEL).parent


class Trainer(Worker):
    """`ours` or `trl` under the given python; a turn is an iteration."""

    def __init__(self, python: str, trainer: str, folder: tempfile.TemporaryDirectory, settings: dict):
        settings = {**settings, "output_dir": str(Path(folder.name) / f"run-{trainer}")}
        file = Path(folder.name) / f"{trainer}.json"
        file.write_text(json.dumps(settings))
        self.folder, self.process, self.warm = folder, None, False
        self.arguments = [python, "-P", "-m", "benchmarks.ppo_iteration", trainer, str(file)]
        offline = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        self.environment = {**os.environ, **offline, "PYTHONPATH": str(roof.ROOT)}

    def _ask(self, what: str):
        if self.process is None:
            self.process = subprocess.Popen(
                self.arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment,
                cwd=roof.ROOT,
            )  # fmt: skip
        return super()._ask(what)


def policy(case: Case, tokenizer) -> torch.nn.Module:
    """`demo`: the embedded model, which ends its responses. Else a random one, whose responses hardly ever end."""
    if case.variant == "demo":
        return models.load_policy("demo")
    config = LlamaConfig(
        vocab_size=max(case.sizes["V"], len(tokenizer)), hidden_size=256, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=8, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def trl_python() -> str | Skip:
    """The python that has TRL 1.12, or why there is none."""
    python = os.environ.get(TRL)
    if not python:
        return Skip(f"{TRL} names no python with TRL 1.12")
    command = [python, "-c", "import importlib.metadata as m; print(m.version('trl'))"]
    try:
        version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return Skip(f"what {TRL} names is no python with TRL")
    return python if version.startswith("1.12.") else Skip(f"{TRL} names a python with TRL {version}, not 1.12")


def build(case: Case) -> Bench:
    folder = tempfile.TemporaryDirectory()
    home = Path(folder.name)
    tokenizer = models.load_tokenizer("demo")
    models.save_model(policy(case, tokenizer), tokenizer, home / "policy")
    reward_model = models.reward_model_from_policy(home / "policy", 0, pad_token_id=tokenizer.pad_token_id)
    models.save_model(reward_model, tokenizer, home / "reward")
    prompts = data.load_rows(DEMO / "prompts.jsonl", "prompts")[: case.sizes["B"]]
    (home / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in prompts))
    shared = {
        "per_device_train_batch_size": len(prompts), "gradient_accumulation_steps": 1, "num_mini_batches": 1,
        "num_ppo_epochs": case.sizes["epochs"], "local_rollout_forward_batch_size": 64, "learning_rate": 3e-6,
        "lr_scheduler_type": "constant", "response_length": case.sizes["T"], "temperature": 1.0, "kl_coef": 0.05,
        "kl_estimator": "k1", "missing_eos_penalty": 1.0, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1,
        "gamma": 1.0, "lam": 0.95, "whiten_rewards": False, "seed": 0,
    }  # fmt: skip
    settings = {
        "threads": torch.get_num_threads(), "policy": str(home / "policy"), "reward_model": str(home / "reward"),
        "prompts_file": str(home / "prompts.jsonl"), "shared": shared,
        "prompt_ids": [data.encode_prompt(tokenizer, row["prompt"]) for row in prompts],
    }  # fmt: skip
    python = trl_python()
    calls = {
        "ours": Trainer(sys.executable, "ours", folder, settings),
        "trl": python if isinstance(python, Skip) else Trainer(python, "trl", folder, settings),
    }
    return Bench(calls)


GOALS = (faster("trl", 2), memory("trl", 1))
# 53 tokens, 4 epochs and one minibatch are TRL's defaults, one epoch is the paper's. The random model has the shape of
# a TinyStories model: a body of 8 million parameters under a vocabulary of the usual size.
CASES = [
    Case(
        "ppo_iteration", "fwdbwd", "fp32", {"B": b, "T": 53, "V": v, "epochs": epochs}, ("ours", "trl"), build, GOALS,
        variant=variant, seconds=20.0,
    )
    for b, v, epochs, variant in ((64, 2048, 4, "demo"), (64, 2048, 1, "demo"), (16, 50257, 4, "random"))
]  # fmt: skip


def test_ppo_iteration(row, measure):
    measure(row)
