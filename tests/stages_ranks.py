"""One rank of tests/rlhf/test_train_stages_ranks.py: stages_ranks.py RUNS.json, a list of [stage, its settings].

Started by accelerate launch with a preset. On a CPU accelerate drops FSDP and DeepSpeed without a word. So, for these,
the type that it gives to a GPU's process is put in; from there on its own code and torch's, or DeepSpeed's, shard.
"""

import gc
import json
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from rlhf.preference import DPOConfig, KTOConfig, train_dpo, train_kto
from rlhf.processes import SHARDING, asks_for
from rlhf.reward import RewardConfig, train_reward
from rlhf.sft import SFTConfig, train_sft
from rlhf.training import StageTrainer

STAGES = {
    "sft": (SFTConfig, train_sft),
    "reward": (RewardConfig, train_reward),
    "dpo": (DPOConfig, train_dpo),
    "kto": (KTOConfig, train_kto),
}
SHARDED = any(map(asks_for, SHARDING))
whole_model = StageTrainer.whole_model


def checked(trainer):
    assert trainer.is_sharded is SHARDED
    if trainer.is_fsdp_enabled:
        weights = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
        assert weights and all(isinstance(weight, DTensor) for weight in weights), "weights are not sharded"
    elif trainer.is_deepspeed_enabled:
        assert trainer.model_wrapped.zero_optimization_partition_gradients(), "DeepSpeed does not shard"
    return whole_model(trainer)


def main():
    StageTrainer.whole_model = checked
    for stage, options in json.loads(Path(sys.argv[1]).read_text()):
        make_config, train = STAGES[stage]
        args = make_config(**options)
        assert args.world_size == 2, args.world_size
        assert PartialState().distributed_type == DistributedType.MULTI_CPU
        if SHARDED:
            PartialState().distributed_type = DistributedType.MULTI_GPU
        train(args)
    PartialState().wait_for_everyone()
    gc.collect()  # the trainers' networks go before their group, see tests/kernels/test_packing_models.py
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
