"""A PPO trainer in a process of its own, which makes an iteration for each turn that the parent asks for.

    PYTHONPATH=. PYTHON -P -m benchmarks.ppo_iteration ours|trl SETTINGS.json

`trl` runs in the environment of requirements-trl-1.12.txt and imports nothing of this project but `benchmarks.roof`.
Either trainer runs its public `train()` from start to end and is neither patched nor stripped: a callback at the end of
each iteration answers the parent's line and waits for the next one. "first" makes two iterations and is answered with
how far they raised the resident memory; "turn" makes one and is answered with its seconds. Loading the models and
setting up the trainer count for neither.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import roof

FOREVER = 1_000_000  # iterations; the process ends when no more lines come in
FIRST = 2  # iterations of "first": from the second one on, gradients and optimizer states exist from the start


def memory_from_here() -> Callable[[], float | None]:
    """Returns what tells the MiB by which resident memory rose at most since now; None where Linux does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        before = roof._status("VmRSS")
    except (OSError, AttributeError):
        return lambda: None
    return lambda: max(roof._status("VmHWM") - before, 0) / 2**20


class Turns:
    """The conversation with the parent, led from inside of a training loop."""

    def __init__(self, answers):
        self.answers, self.what, self.left = answers, "", 0
        self.start, self.rise = 0.0, None

    def iteration_done(self) -> None:
        """Answer, if what was asked for is done, and wait for the next line; without one the process ends."""
        seconds = time.perf_counter() - self.start
        self.left -= 1
        if self.left > 0:
            return
        if self.what:
            self.answer(({}, self.rise()) if self.what == "first" else [seconds])
        self.what = sys.stdin.readline().strip()
        if not self.what:
            raise SystemExit(0)
        self.left = FIRST if self.what == "first" else 1
        if self.what == "first":
            self.rise = memory_from_here()
        self.start = time.perf_counter()

    def answer(self, what) -> None:
        print(json.dumps(what), file=self.answers, flush=True)


def train_ours(settings: dict, turns: Turns) -> None:
    """`rlhf.ppo.PPOTrainer` as `rlhf ppo` runs it. TRL's PPO clips no gradients, so here none are clipped."""
    from rlhf.ppo import PPOConfig, PPOTrainer

    config = PPOConfig(
        sft_model_path=settings["policy"], reward_model_path=settings["reward_model"],
        dataset_name=settings["prompts_file"], output_dir=settings["output_dir"], max_steps=FOREVER, save_steps=0,
        max_grad_norm=None, disable_tqdm=True, **settings["shared"],
    )  # fmt: skip
    trainer = PPOTrainer(config, callbacks=[lambda *_: turns.iteration_done()])
    turns.iteration_done()
    trainer.train()


def train_trl(settings: dict, turns: Turns) -> None:
    """`trl.experimental.ppo.PPOTrainer`; off by choice: bf16, checkpointed activations, samples shown in between."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Wait(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            turns.iteration_done()

    tokenizer = AutoTokenizer.from_pretrained(settings["policy"], padding_side="left")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(settings["policy"], dtype=torch.float32) for _ in range(2)
    )
    reward_model, value_model = (
        AutoModelForSequenceClassification.from_pretrained(settings["reward_model"], dtype=torch.float32)
        for _ in range(2)
    )
    config = PPOConfig(
        output_dir=settings["output_dir"], total_episodes=FOREVER * len(settings["prompt_ids"]), stop_token="eos",
        bf16=False, gradient_checkpointing=False, num_sample_generations=0, use_cpu=True, save_strategy="no",
        report_to="none", disable_tqdm=True, **settings["shared"],
    )  # fmt: skip
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward_model,
        value_model=value_model, train_dataset=Dataset.from_dict({"input_ids": settings["prompt_ids"]}),
        callbacks=[Wait()],
    )  # fmt: skip
    turns.iteration_done()
    trainer.train()


def main(trainer: str, settings_file: str) -> None:
    """Run the trainer; a failure is an answer too: {"failed": why}. What the trainer prints goes to stderr."""
    turns = Turns(sys.stdout)
    sys.stdout = sys.stderr
    settings = json.loads(Path(settings_file).read_text())
    torch.set_num_threads(settings["threads"])
    try:
        {"ours": train_ours, "trl": train_trl}[trainer](settings, turns)
    except Exception as failure:
        turns.answer({"failed": f"{type(failure).__name__}: {failure}"})
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
