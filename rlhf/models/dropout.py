"""Dropout: none where the method forbids it, residual dropout where the paper has it."""

from torch import nn


def disable_dropout(model):
    """Set every dropout of the model to 0, in its modules and in its config, so that train and eval mode agree."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    for name, value in vars(model.config).items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(model.config, name, 0.0)


def set_residual_dropout(model, p):
    """Dropout with probability `p` on what each attention and each feed-forward block adds to the residual stream."""
    layers = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not layers:
        raise ValueError(f"dropout: {type(model).__name__} has no list of layers to put residual dropout into; use 0")

    def drop(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        first = nn.functional.dropout(first, p, training=module.training)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    found = 0
    for layer in max(layers, key=len):
        for name, module in layer.named_children():
            if "attn" in name or "attention" in name.split("_") or "mlp" in name or name == "feed_forward":
                module.register_forward_hook(drop)
                found += 1
    if not found:
        raise ValueError(f"dropout: the layers of {type(model).__name__} have no known residual blocks; use 0")
