"""One rank of tests/rlhf/test_train_stages_ranks.py: wrapped_scores_ranks.py RANK RENDEZVOUS_FILE. Two rows a rank."""

import gc
import sys

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rlhf import models
from rlhf.models.sequences import label_log_probs, label_loss
from rlhf_kernels import pack_responses

SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1}
GROUPED = {"num_key_value_heads": 1}
FAMILIES = {
    "Llama": GROUPED,
    "Qwen2": {**GROUPED, "tie_word_embeddings": True},
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Mistral": GROUPED,
    "Gemma": {**GROUPED, "head_dim": 8},
    "Granite": {**GROUPED, "logits_scaling": 2.0},  # transformers has no classifier of it
    "Gemma2": {**GROUPED, "head_dim": 8, "final_logit_softcapping": 2.0},
    "GPT2": {},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 32, "max_position_embeddings": 32, "word_embed_proj_dim": 8},
    "Phi": GROUPED,
}


def make(family, head):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE, **IDS, **FAMILIES[family])
    if head == "CausalLM" and family == "GPT2":
        head = "LMHeadModel"
    name = family + (head if head == "LMHeadModel" else f"For{head}")
    if hasattr(transformers, name):
        model = getattr(transformers, name)(config)
    else:
        model = models.reward_model_from_policy(getattr(transformers, f"{family}ForCausalLM")(config), 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.2)
    models.disable_dropout(model)
    model.config.reward_bias = 0.5
    return model


def sharded(model):
    """Each layer a unit; embeddings, final norm and head in the root's."""
    mesh = init_device_mesh("cpu", (2,))
    for layers in [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def scores(model, rank):
    """Of padded rows, the pad id inside them, and of two responses behind one prompt."""
    ids = torch.randint(3, 40, (4, 7), generator=torch.Generator().manual_seed(1))
    ids[1, 2] = 0
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[2, 4:] = mask[3, :2] = False
    own = slice(2 * rank, 2 * rank + 2)
    padded = models.token_scores(model, ids[own], mask[own])[mask[own]]
    packed = pack_responses([[5, 6, 7]], [[[8, 9 + rank], [10, 11, 12]]])
    shared = models.token_scores(model, packed.input_ids, packed.attention_mask, packed.position_ids)
    return torch.cat([padded, shared.flatten()])


def losses(model, rank):
    ids = torch.randint(3, 40, (4, 7), generator=torch.Generator().manual_seed(2))[2 * rank : 2 * rank + 2]
    rows = torch.tensor([0, 1, 2, 8, 9])
    inputs, labels = (ids, None, None), ids.flatten()[rows + 1]
    loss = label_loss(model, inputs, labels, rows, num_items_in_batch=10)
    return torch.cat([label_log_probs(model, inputs, labels, rows, temperature=0.7), loss[None]])


def compare(name, whole, wrapped, function, rank):
    """Values of this rank, and the mean of both ranks' gradients, to a few roundings."""
    expected = [function(whole, other) for other in range(2)]
    actual = function(wrapped, rank)
    gap = (actual - expected[rank]).abs().max()
    assert gap < 1e-5, f"{name}: values differ by {gap}"
    sum((values * torch.linspace(-1, 2, len(values))).sum() / 2 for values in expected).backward()
    (actual * torch.linspace(-1, 2, len(actual))).sum().backward()
    for (weight_name, weight), other in zip(
        whole.named_parameters(), models.unwrapped(wrapped).parameters(), strict=True
    ):
        if weight.grad is None:
            continue
        grad = other.grad.full_tensor() if hasattr(other.grad, "full_tensor") else other.grad
        assert (grad - weight.grad).abs().max() <= 1e-5 * weight.grad.abs().max() + 1e-6, f"{name}, {weight_name}"


def main():
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    for family in FAMILIES:
        for head, function in (("SequenceClassification", scores), ("CausalLM", losses)):
            for wrap in (sharded, DistributedDataParallel):
                name = f"{family}, {wrap.__name__}, {head}"
                compare(name, make(family, head), wrap(make(family, head)), function, rank)
    try:
        models.hidden_states(sharded(make("Llama", "CausalLM")), torch.ones(1, 2, dtype=torch.int64))
    except ValueError as error:
        assert "got one wrapped by FSDPLlamaForCausalLM" in str(error), error
    else:
        raise AssertionError("the trunk of a wrapped model must not run alone")
    gc.collect()  # wrapped networks go before their group, see tests/kernels/test_packing_models.py
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
