"""One rank of tests/test_train_sharded.py: sharded_ranks.py RUNS.json, a list of [stage, its settings].

Started by accelerate launch with rlhf/presets/accelerate/fsdp2.yaml. On a CPU accelerate drops FSDP without a word. So
the type that it gives to a GPU's process is put in; from there on its own code and torch's shard, over gloo.
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from rlhf.preference import DPOConfig, train_dpo
from rlhf.reward import RewardConfig, train_reward
from rlhf.sft import SFTConfig, train_sft
from rlhf.training import StageTrainer

STAGES = {"sft": (SFTConfig, train_sft), "reward": (RewardConfig, train_reward), "dpo": (DPOConfig, train_dpo)}
whole_model = StageTrainer.whole_model


def checked(trainer):
    weights = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    assert weights and all(isinstance(weight, DTensor) for weight in weights), "weights are not sharded"
    return whole_model(trainer)


def main():
    StageTrainer.whole_model = checked
    for stage, options in json.loads(Path(sys.argv[1]).read_text()):
        make_config, train = STAGES[stage]
        args = make_config(**options)
        assert args.world_size == 2, args.world_size
        assert PartialState().distributed_type == DistributedType.MULTI_CPU
        PartialState().distributed_type = DistributedType.MULTI_GPU
        train(args)


if __name__ == "__main__":
    main()
