"""torch.set_default_dtype(bfloat16), as people have it who build large models by hand, changes no step of a trainer."""

import ast
from pathlib import Path

import pytest
import torch

import rlhf
from rlhf import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from tests.tiny import model_folder

STORIES = [{"prompt": f"{word} the", "completion": f"dog ran {word}"} for word in "abcdefgh"]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "cat sat"} for row in STORIES]
RANKED = [
    {"prompt": row["prompt"], "completions": [row["completion"], "cat sat", "up"], "ranks": [0, 1, 2]}
    | {"weight": 0.7, "margins": [[0, 0.3, 0.7], [0, 0, 0.1], [0, 0, 0]]}
    for row in STORIES
]
# What PyTorch gives the default dtype, whatever the values are.
FACTORIES = ("empty", "eye", "full", "linspace", "normal", "ones", "rand", "randn", "zeros")


@pytest.fixture
def default_dtype():
    """torch.set_default_dtype, and float32 again afterwards."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def stages(tmp_path, home):
    """{stage: train(name of the run) -> the weights after two steps}."""
    policy = model_folder(tmp_path / "policy")

    def trained(trainer_class, config, rows):
        def train(name):
            options = {"use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "max_steps": 2}
            args = config(output_dir=str(tmp_path / name), save_strategy="no", eval_fraction=0.0, **options)
            trainer = trainer_class(policy, args=args, train_dataset=rows)
            trainer.train()
            return dict(trainer.model.named_parameters())

        return train

    def ppo(name):
        trainer = home.trainer(name)
        trainer.train()
        return dict(trainer.policy.named_parameters()) | {"value": trainer.value.score.weight}

    return {
        "sft": trained(SFTTrainer, SFTConfig, STORIES),
        "reward": trained(RewardTrainer, RewardConfig, RANKED),
        "dpo": trained(DPOTrainer, DPOConfig, PAIRS),
        "kto": trained(KTOTrainer, KTOConfig, PAIRS),
        "ppo": ppo,
    }


@pytest.mark.parametrize("stage", ("sft", "reward", "dpo", "kto", "ppo"))
def test_a_stage_makes_the_same_steps(stage, stages, default_dtype):
    expected = stages[stage]("float32")
    default_dtype(torch.bfloat16)
    found = stages[stage]("bfloat16")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], weight), name


def test_every_allocation_of_the_trainers_names_its_dtype():
    silent, seen = [], 0
    for path in sorted(Path(rlhf.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("torch.") in FACTORIES:
                seen += 1
                if "dtype" not in {keyword.arg for keyword in node.keywords}:
                    silent.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert seen > 10 and not silent, "\n".join(silent)
