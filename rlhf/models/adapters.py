"""LoRA adapters of the package peft: put on a model, switched off, saved and merged."""

import contextlib
import copy

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor


def add_adapters(args, model, task_type, peft_config=None):
    """The model, with LoRA adapters if the run asks for them.

    Args:
        peft_config: a `peft.LoraConfig` in place of the lora_* settings; None = those.
    """
    if not args.use_peft:
        return model
    try:
        import peft
    except ImportError:
        raise ValueError("use_peft: the package peft is not installed (pip install peft)") from None
    if not isinstance(peft_config, peft.PeftConfig | None):
        raise ValueError(f"peft_config: got {type(peft_config).__name__}, wants a peft.LoraConfig")
    config = copy.deepcopy(peft_config) or peft.LoraConfig(  # peft writes into it
        task_type=task_type,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
    )
    return peft.get_peft_model(model, config)


class AdaptersOff(nn.Module):
    """The network under a PEFT model, as it was before its adapters: the same weights, no second copy of them.

    The adapters are off while this one runs, and on again after it, also after an exception. Its parameters are the
    frozen weights; `train()` and `eval()` leave the PEFT model as it is.
    """

    def __init__(self, model):
        super().__init__()
        object.__setattr__(self, "module", model)  # seen by those who unwrap, but no submodule

    def named_parameters(self, *args, **kwargs):
        trained = trained_names(self.module)
        yield from ((name, w) for name, w in self.module.named_parameters(*args, **kwargs) if name not in trained)

    def forward(self, *args, **kwargs):
        with self.module.disable_adapter():
            return self.module(*args, **kwargs)


def trained_names(model) -> set[str]:
    """Names of the parameters that belong to the adapters of a PEFT model, or replace a layer."""
    parts = ("lora_", "modules_to_save")
    return {name for name, _ in model.named_parameters() if any(part in name for part in parts)}


def load_adapters(model, folder) -> None:
    """Put back the adapters that `model.save_pretrained(folder)` wrote, onto a PEFT model of the same settings.

    Raises:
        ValueError: the folder holds other adapters.
    """
    import peft

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"resume_from_checkpoint: {folder} holds no adapters; it was written without use_peft")
    weights = load_file(file)
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = sorted(name for name in own.keys() | weights.keys() if _shape(own, name) != _shape(weights, name))
    if wrong:
        raise ValueError(
            f"resume_from_checkpoint: {file} holds other adapters than lora_r and lora_target_modules ask for: "
            f"{wrong[0]} is {_shape(weights, wrong[0])}, want {_shape(own, wrong[0])}"
        )
    peft.set_peft_model_state_dict(model, weights)


def _shape(weights, name):
    return tuple(weights[name].shape) if name in weights else "absent"


@torch.no_grad()
def merged(model):
    """(transformers model, state dict) to save: of a PEFT model with the adapters in the weights, and only there.

    A model without adapters comes back with None: its state is its own.
    """
    if not hasattr(model, "get_base_model"):
        return model, None
    from peft.tuners.lora import LoraLayer

    base, state = model.get_base_model(), {}
    for name, weight in base.state_dict().items():
        if "original_module." in name or "lora_" in name:
            continue
        state[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = weight
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            state[f"{name}.weight"] = (weight + layer.get_delta_weight("default")).to(weight.dtype)
    return base, state


def merged_whole(model, *, zero=False):
    """`merged` of a PEFT model that FSDP2, or DeepSpeed's ZeRO if `zero`, has sharded: copies of whole weights.

    All processes must call. ZeRO-3 gathers the whole model on each of them for it, FSDP2 one weight at a time.
    """
    with _gathered(model) if zero else contextlib.nullcontext():
        base, state = merged(model)
        return base, {
            name: weight.full_tensor().cpu() if isinstance(weight, DTensor) else weight.clone()
            for name, weight in state.items()
        }


def _gathered(model):
    from deepspeed import zero

    return zero.GatheredParameters([weight for weight in model.parameters() if hasattr(weight, "ds_id")])
