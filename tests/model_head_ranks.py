"""One rank of test_sharded_models: python model_head_ranks.py RANK RENDEZVOUS_FILE. Two ranks, a row of tokens each."""

import gc
import sys
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import rlhf_kernels as rk

SHAPE = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}


def make(tied, adapted=False):
    """A small Llama; adapted: with LoRA adapters of peft, which alone are trained, on its head and its queries."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, **heads, tie_word_embeddings=tied))
    if adapted:
        import peft

        config = peft.LoraConfig(r=3, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, config).get_base_model()
    return model


def sharded(model, head_apart):
    mesh = init_device_mesh("cpu", (2,))
    for part in [*model.model.layers, *([model.lm_head] if head_apart else [])]:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main():
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    ids = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    cases = [(False, False), (True, False), *([(False, True)] if find_spec("peft") else [])]
    for tied, adapted in cases:
        whole = make(tied, adapted)
        sum(-rk.linear_logprobs_from_model(whole, row[None]).mean() / 2 for row in ids).backward()
        wrappers = {"fsdp": lambda m: sharded(m, False), "ddp": DistributedDataParallel}
        if not tied:
            wrappers["head apart"] = lambda m: sharded(m, True)
        for name, wrap in wrappers.items():
            model = make(tied, adapted)
            wrapped = wrap(model)
            (-rk.linear_logprobs_from_model(wrapped, ids[rank : rank + 1]).mean()).backward()
            assert any(x.grad is not None for x in whole.parameters())
            for (parameter, actual), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
                if expected.grad is None:
                    assert actual.grad is None
                    continue
                grad = actual.grad.full_tensor() if hasattr(actual.grad, "full_tensor") else actual.grad
                gap = (grad - expected.grad).abs().max() / expected.grad.abs().max()
                assert gap < 1e-6, f"{name}, tied {tied}, adapted {adapted}, {parameter}: {gap}"
    model = sharded(make(False), False)
    try:
        rk.linear_logprobs(torch.zeros(2, 16), model.lm_head.weight, torch.zeros(2, dtype=torch.int64))
    except ValueError as error:
        assert "weight is a DTensor with placements [Shard(dim=0)]" in str(error), error
    else:
        raise AssertionError("a sharded weight must be refused")
    del wrapped, model  # before their group, see tests/kernels/test_packing_models.py
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
