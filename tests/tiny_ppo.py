"""Policies and reward models of a few thousand parameters with their data, for the tests of PPO."""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from rlhf import checkpoint, models
from rlhf.metrics import Averages
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.rollouts.sampling import Rollouts
from tests.processes import run

WORDS = ["<pad>", "<unk>", "</s>", ".", "banana", "the", "cat", "dog"]
WORDS += ["sat", "ran", "on", "a", "mat", "and", "saw", "it"]
PAD, EOS, STOP, BANANA = 0, 2, 3, 4
PHASES = ("rollout", "score", "evaluate", "update")
TIMINGS = ("time", "eps", "tokens_per_sec", *(f"time/{phase}" for phase in PHASES))
TIMINGS += tuple(f"throughput/{phase}_tokens_per_sec" for phase in PHASES)
TIMINGS += ("rollout/seconds_waited", "rollout/seconds_sampled")
ROOT = Path(__file__).resolve().parent.parent


def make_tokenizer(words=WORDS):
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_config(kind):
    ids = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
    if kind == "gpt2":  # every dropout on, as in the checkpoints that people have
        return GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2, n_positions=48, initializer_range=0.3, **ids)
    return LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=48, initializer_range=0.3, **ids,
    )  # fmt: skip


@dataclass
class Home:
    path: object

    def config(self, out="run", kind="llama", **options) -> PPOConfig:
        settings = {
            "sft_model_path": str(self.path / kind), "reward_model_path": str(self.path / f"{kind}-rm"),
            "dataset_name": str(self.path / "prompts.jsonl"), "output_dir": str(self.path / out), "response_length": 8,
            "rollout_batch_size": 8, "per_device_train_batch_size": 4, "num_ppo_epochs": 1, "learning_rate": 1e-2,
            "max_steps": 2, "disable_tqdm": True, "save_steps": 0, "seed": 7,
        }  # fmt: skip
        return PPOConfig(**(settings | options))

    def trainer(self, out="run", reward_fn=None, callbacks=(), **options) -> PPOTrainer:
        if reward_fn is not None:
            options["reward_model_path"] = None
        return PPOTrainer(self.config(out, **options), reward_fn=reward_fn, callbacks=callbacks)

    def rows(self, out="run", file="metrics.jsonl") -> list[dict]:
        return [json.loads(line) for line in (self.path / out / file).read_text().splitlines()]


def write_files(path):
    """Policies, reward models, prompts and pretraining text."""
    tokenizer = make_tokenizer()
    for kind in ("llama", "gpt2"):
        torch.manual_seed(0)
        models.save_model(AutoModelForCausalLM.from_config(make_config(kind)), tokenizer, path / kind)
        reward_model = models.reward_model_from_policy(path / kind, 1, pad_token_id=PAD)
        reward_model.config.reward_bias = 0.75
        models.save_model(reward_model, tokenizer, path / f"{kind}-rm")
    prompts = ["the cat", "a dog sat on", "it", "the dog and the cat ran", "the mat", "a cat saw it"]
    (path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    texts = ["the cat sat on the mat .", "a dog ran .", "it saw a cat and a dog ."]
    (path / "text.txt").write_text("\n\n".join(texts * 3))
    return path


def own_home(files, tmp_path):
    """A folder of its own for one test, with links to the shared models and data."""
    for entry in files.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    return Home(tmp_path)


def perturb(model, size=0.05):
    """Move the weights, so that the policy is no longer the reference."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator))


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def bananas(prompts, completions, completion_ids, **columns):
    return [float(ids.count(BANANA)) for ids in completion_ids]


def experience_of(trainer, averages=None):
    """Roll out, score and evaluate once."""
    rows = trainer.next_prompts()
    rollouts = trainer.sample(rows)
    scores = trainer.shape_scores(trainer.score(rows, rollouts), rollouts)
    experience = trainer.evaluate(rollouts)
    trainer.estimate_advantages(experience, scores, Averages() if averages is None else averages)
    return experience, scores


HAND_MADE = Rollouts(
    prompt_ids=[[5, 6], [11, 7, 8, 10], [15], [5, 7]],
    response_ids=[[4, 5, EOS], [6] * 8, [EOS], [4, 4, 9, 10, 5]],
    ended=[True, False, True, False],
)


def forked(home, plan):
    """Run the plan in children of `ppo_forks.py`; return what each run was doing when it was killed."""
    (home.path / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, str(ROOT / "tests" / "ppo_forks.py"), "plan.json", "result.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = run(command, cwd=home.path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((home.path / "result.json").read_text())


SAME = {
    "temperature": 0.7, "num_ppo_epochs": 2, "ptx_coef": 0.5, "ptx_batch_multiplier": 2, "ema_decay": 0.9,
    "kl_target": 0.3, "kl_horizon": 50, "num_responses": 2, "max_steps": 5, "missing_eos_penalty": 1.0,
    "adam_epsilon": 1e-3, "learning_rate": 3e-3, "num_logged_samples": 8, "dtype": "float64", "packing": "false",
}  # fmt: skip
# Runs that another number of processes cuts up otherwise differ by roundings, which AdamW can make large: its step
# rate * m / (sqrt(v) + epsilon) turns a rounding d of a small gradient into rate * d / epsilon. So the models are
# float64; and apart, as Llama's norms are fp32 even so, and round the sum of a shared prompt's gradients once.
# What is left in fp32 are the values, whose gradients are vf_coef times as large, and the average of the weights.
_STEPS = 5 * 2 * 2  # iterations, epochs, minibatches
SAME_WEIGHTS = _STEPS * SAME["learning_rate"] / SAME["adam_epsilon"] * 0.1 * 2 * 2**-24  # 7e-7, for values up to 2
SAME_AVERAGE = SAME["max_steps"] * 2**-23  # 6e-7: of weights up to 1, one rounding an iteration in each run


def same_config(home, out, processes, **changes):
    options = SAME | {"per_device_train_batch_size": 4 // processes, "ptx_dataset_name": str(home.path / "text.txt")}
    return home.config(out, **options | changes)


def assert_equal_runs(home, one, two, iterations=5):
    """Equal samples; metrics and weights equal up to rounding, which in a mean of 64 fp32 numbers is 64 * 2**-24."""
    samples = [home.rows(out, "samples.jsonl") for out in (one, two)]
    assert len(samples[0]) == 8 * iterations
    for a, b in zip(*samples, strict=True):
        assert a | {"score": 0} == b | {"score": 0} and a["score"] == pytest.approx(b["score"], rel=2**-23)
    for a, b in zip(home.rows(one), home.rows(two), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {*TIMINGS, "val/ratio_var", "val/ratio_max"}:  # these two are means over micro-batches
            assert a[name] == pytest.approx(b[name], rel=64 * 2**-24, abs=1e-6), name
    start = {"model": home.path / "llama", "value/model": home.path / "llama-rm"}
    for name, folder in start.items():
        first, second = (load_file(home.path / out / f"{name}.safetensors") for out in (one, two))
        before = load_file(folder / "model.safetensors")
        assert farthest(first, before) > 1e-4
        assert farthest(first, second) < (SAME_AVERAGE if name == "model" else SAME_WEIGHTS), name


def farthest(first, second):
    """The largest difference of two networks' weights."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def assert_same_run(home, first, second, slices=False):
    """Metrics (but for the time), samples, and every tensor of the final models and the last checkpoint, to the bit.

    Args:
        slices: the checkpoints are written in slices.
    """
    for file in ("metrics.jsonl", "samples.jsonl"):
        rows = [
            [{name: value for name, value in row.items() if name not in TIMINGS} for row in home.rows(out, file)]
            for out in (first, second)
        ]
        assert rows[0] == rows[1] and rows[0]
    last = [checkpoint.last_checkpoint(home.path / out).name for out in (first, second)]
    assert last[0] == last[1]
    written = () if slices else ("model", "value/model", "ema", "within_budget")
    places = ("model", "value/model", *(f"{last[0]}/{name}" for name in written))
    if slices:
        assert equal(*(joined(home.path / out / last[0] / "shards") for out in (first, second)))
    for place in places:
        tensors = [load_file(home.path / out / f"{place}.safetensors") for out in (first, second)]
        assert equal(*tensors), place
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        states = [torch.load(home.path / out / last[0] / name, weights_only=True) for out in (first, second)]
        assert same(*states), name
    texts = [json.loads((home.path / out / last[0] / "trainer_state.json").read_text()) for out in (first, second)]
    assert [text | {"seconds": None} for text in texts[:1]] == [text | {"seconds": None} for text in texts[1:]]


def joined(shards):
    """The whole tensors of a checkpoint that was written in slices."""
    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(shards, f"{folder}/whole.pt")
        return torch.load(f"{folder}/whole.pt", weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
