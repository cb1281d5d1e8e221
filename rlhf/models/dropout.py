"""Dropout: none where the method forbids it, residual dropout where the paper has it."""

import contextlib

from torch import nn
from transformers import PreTrainedConfig


def disable_dropout(model):
    """Make train mode compute what eval mode computes: no dropout, no dropped layers, no jitter.

    Every probability of dropping something becomes 0, in the modules and in all configs that they may read. A module
    with jitter, as routers of experts have it, stays in eval mode: what jitters may count there, too, as in PhiMoE,
    which also draws its experts in train mode.
    """
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
            elif "jitter" in name and isinstance(value, float) and value:
                keep_in_eval_mode(module)
    for config in _configs(model):
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)


def keep_in_eval_mode(module):
    """Let a module alone, not those inside it, run in eval mode whatever mode the model is in."""
    if _to_eval_mode not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_to_eval_mode)


def _to_eval_mode(module, args):
    module.training = False


def _configs(model):
    """The configs of a model and of its modules, with the configs inside them."""
    found = {}
    waiting = [config for module in model.modules() if (config := vars(module).get("config")) is not None]
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting += vars(config).values()
    return found.values()


def set_residual_dropout(model, p):
    """Dropout with probability `p` on what each attention and each feed-forward block adds to the residual stream."""
    layers = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not layers:
        raise ValueError(f"dropout: {type(model).__name__} has no list of layers to put residual dropout into; use 0")

    def drop(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        first = nn.functional.dropout(first, module.residual_dropout, training=module.training)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    found = 0
    for layer in max(layers, key=len):
        for name, module in layer.named_children():
            if "attn" in name or "attention" in name.split("_") or "mlp" in name or name == "feed_forward":
                module.residual_dropout = float(p)
                module.register_forward_hook(drop)
                found += 1
    if not found:
        raise ValueError(f"dropout: the layers of {type(model).__name__} have no known residual blocks; use 0")


@contextlib.contextmanager
def residual_dropout_off(model):
    """The model without the dropout of `set_residual_dropout`, inside the block."""
    asked = {module: module.residual_dropout for module in model.modules() if hasattr(module, "residual_dropout")}
    try:
        for module in asked:
            module.residual_dropout = 0.0
        yield
    finally:
        for module, p in asked.items():
            module.residual_dropout = p
