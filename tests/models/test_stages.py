"""One step of SFT, reward model and PPO by the command line, on a tiny model of each family that people train."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from rlhf import models
from rlhf.cli import main
from tests.models.tiny_configs import tiny_model
from tests.tiny import word_tokenizer, words, write_jsonl
from tests.tiny_reward import rankings

QUICK = ("llama", "gpt2")
FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox",
    "phi3", "opt", "falcon", "bloom", "gpt_oss", "olmo2", "deepseek_v3", "smollm3", "starcoder2", "stablelm", "gptj",
    "glm4", "gemma3", "gemma4", "llama4", "qwen3_next", "qwen3_5", "lfm2", "mamba", "mamba2", "granite", "cohere",
    "olmoe", "falcon_h1", "glm4_moe", "granitemoehybrid",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Paths of demonstrations, rankings and prompts of a few words."""
    folder, generator = tmp_path_factory.mktemp("data"), random.Random(0)
    prompts = [words(generator, 2, 6) for _ in range(8)]
    demonstrations = [{"prompt": prompt, "completion": words(generator, 2, 5)} for prompt in prompts]
    return {
        "sft": write_jsonl(folder / "sft.jsonl", demonstrations),
        "reward": write_jsonl(folder / "reward.jsonl", rankings(8, sizes=(3,))),
        "ppo": write_jsonl(folder / "ppo.jsonl", [{"prompt": prompt} for prompt in prompts]),
    }


def stage(name, capsys, **flags):
    """Run a stage for one step; its own folder's metrics."""
    flags = {"max_steps": 1, "disable_tqdm": "true", "per_device_train_batch_size": 4, "learning_rate": 1e-3, **flags}
    code = main([name, *(f"--{flag}={value}" for flag, value in flags.items())])
    assert code == 0, capsys.readouterr().err.splitlines()[-1]
    return [json.loads(line) for line in open(f"{flags['output_dir']}/metrics.jsonl")]


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in QUICK else pytest.mark.slow) for family in FAMILIES]
)
def test_three_stages(family, data, tmp_path, capsys):
    """Each stage ends well and trains; PPO's old log-probs are those of the policy that sampled."""
    model = tiny_model(family, torch.float32)
    models.save_model(model, word_tokenizer(), tmp_path / "base")
    paths = {name: str(tmp_path / name) for name in ("base", "sft", "reward", "ppo")}
    texts = {"max_length": 32, "use_cpu": "true"}
    for name, origin, extra in (("sft", "base", {"sample_length": 6}), ("reward", "sft", {})):
        start = {"model_name_or_path": paths[origin], "dataset_name": data[name], "output_dir": paths[name]}
        stage(name, capsys, **start, **texts, **extra)
    start = {"sft_model_path": paths["sft"], "reward_model_path": paths["reward"], "dataset_name": data["ppo"]}
    sizes = {"response_length": 6, "rollout_batch_size": 8, "per_device_train_batch_size": 8, "num_responses": 4}
    (row,) = stage("ppo", capsys, **start, **sizes, output_dir=paths["ppo"], num_ppo_epochs=1)
    assert row["val/ratio_max"] == pytest.approx(1, abs=1e-3) and row["grad_norm/policy"] > 0
    before, after = (weights(tmp_path / name) for name in ("sft", "ppo"))
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)


def weights(folder):
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}
