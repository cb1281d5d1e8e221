"""One rank of two of test_trl_ranks.py: trl_ranks.py FOLDER. A step of TRL's trainers, with the drop-in and without.

Started by accelerate launch with a preset. On a CPU accelerate drops FSDP and DeepSpeed without a word; as in
tests/stages_ranks.py the type that it gives to a GPU's process is put in.
"""

import gc
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer, SFTConfig

from rlhf_kernels.integrations import trl as rk_trl
from tests.integrations import test_trl, test_trl_reward
from tests.tiny import language_model, word_tokenizer

CHANGES = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 1e3, "logging_steps": 1}


def sft(folder):
    tokenizer = word_tokenizer()
    return test_trl.sft(language_model(tokenizer), tokenizer, folder, **CHANGES)


def pairs(folder):
    model = LlamaForSequenceClassification.from_pretrained(folder / "reward")
    return test_trl_reward.make(RewardTrainer, test_trl_reward.PAIRS[:4], folder, model, **CHANGES)


def ranked(folder):
    model = LlamaForSequenceClassification.from_pretrained(folder / "reward")
    return test_trl_reward.make(rk_trl.RankedRewardTrainer, test_trl_reward.RANKED[:4], folder, model, **CHANGES)


def step(make, folder, sharding):
    """(every logged number, whole weights) after one step."""
    trainer = make(folder)
    log, _ = test_trl_reward.step(trainer)
    model, weights = trainer.model, dict(trainer.model.named_parameters())
    if sharding == "deepspeed":
        import deepspeed

        assert all(weight.numel() == 0 for weight in weights.values()), "weights are not sharded"
        with deepspeed.zero.GatheredParameters(list(weights.values())):
            return log, {name: weight.detach().clone() for name, weight in model.named_parameters()}
    assert all(isinstance(weight, DTensor) for weight in weights.values()) is (sharding == "fsdp")
    return log, {name: w.full_tensor() if sharding else w.detach() for name, w in weights.items()}


def on_two_processes(make_config, sharding):
    """A config's class whose processes are a GPU's, which accelerate looks at when a trainer is made."""

    def make(**options):
        config = make_config(**options)
        assert config.world_size == 2 and PartialState().distributed_type == DistributedType.MULTI_CPU
        if sharding:
            PartialState().distributed_type = DistributedType.MULTI_GPU
        return config

    return make


def main():
    folder, sharding = Path(sys.argv[1]), sys.argv[2]
    test_trl.SFTConfig = on_two_processes(SFTConfig, sharding)
    test_trl_reward.RewardConfig = on_two_processes(RewardConfig, sharding)
    for make in (sft, pairs):
        results = []
        for context in (nullcontext, rk_trl.patched):
            with context():
                results.append(step(make, folder, sharding))
        (theirs, their_weights), (ours, weights) = results
        assert ours.keys() == theirs.keys() and theirs["grad_norm"] > 0.01
        for key, value in theirs.items():
            assert abs(ours[key] - value) <= 2e-6 + 2e-5 * abs(value), (make, key, ours[key], value)
        for key, weight in their_weights.items():
            torch.testing.assert_close(weights[key], weight, rtol=1e-5, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")
    log, weights = step(ranked, folder, sharding)
    torch.save((log, weights), folder / f"ranked-{PartialState().process_index}.pt")
    PartialState().wait_for_everyone()
    gc.collect()  # the trainers' networks go before their group
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
