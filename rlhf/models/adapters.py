"""LoRA adapters of the package peft: put on a model, switched off, saved and merged."""

import contextlib
import copy
import logging
from collections import Counter

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from .forward import is_classifier, model_inputs, token_scores, unwrapped
from .parts import text_config

logger = logging.getLogger("rlhf")
ALL_LINEAR = "all-linear"


def add_adapters(args, model, task_type, peft_config=None):
    """The model, with LoRA adapters if the run asks for them.

    Args:
        peft_config: a `peft.LoraConfig` in place of the lora_* settings; None = those.
    Raises:
        ValueError: peft is missing or cannot adapt the model so; or what the adapters learn could not be merged into
            the model's weights at the end.
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
        target_modules=_targets(args.lora_target_modules),
    )
    setting = "lora_target_modules" if peft_config is None else "peft_config"
    if isinstance(config, peft.LoraConfig) and config.target_modules is None and not config.target_parameters:
        config.target_modules = default_targets(model)
    if getattr(config, "target_modules", None) == ALL_LINEAR and config.exclude_modules is None:
        config.exclude_modules = unfit(model)
    try:
        adapted = peft.get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{setting}: got {_shown(config)}, which peft cannot adapt in {type(model).__name__} ({reason}); "
            "all-linear adapts all linear layers but the head"
        ) from None
    check_merge(adapted, setting)
    return adapted


def _targets(names):
    """What peft takes for the names of the settings: its word for all linear layers is no name of a list."""
    words = [names] if isinstance(names, str) else list(names or ())
    return ALL_LINEAR if [word.lower() for word in words] == [ALL_LINEAR] else names


def _shown(config):
    targets = getattr(config, "target_modules", None) or getattr(config, "target_parameters", None)
    return targets if isinstance(targets, str) else ", ".join(sorted(targets or ())) or "none"


def default_targets(model) -> list[str] | str:
    """The layers that peft adapts in this architecture; where it names none, the linear layers of the decoder."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OF_PEFT

    known = OF_PEFT.get(model.config.model_type)
    if isinstance(known, str):
        return known
    if any(name.endswith(f".{end}") for name, _ in model.named_modules() for end in known or ()):
        return known
    inner = unwrapped(model)
    decoder, heads = inner.get_decoder(), {inner.get_output_embeddings()}
    heads |= {getattr(inner, name, None) for name in ("score", "classifier")}
    inside = set((inner.base_model if decoder is inner else decoder).modules()) - heads
    left_out = unfit(model)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module in inside and name not in left_out
    ]
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in found}))
    logger.warning(
        "lora_target_modules: peft names none for %s; %d linear layers get adapters (%s)",
        model.config.model_type, len(found), kinds,
    )  # fmt: skip
    return found


def unfit(model) -> list[str]:
    """Names of the linear layers on which an adapter would do nothing, break the forward, or could not be saved.

    They are those whose weights fused kernels of a state-space mixer (it has a `conv1d`) read without calling them;
    those with a forward of their own, as routers have; and those that share a weight with another layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    mixers = [module for module in model.modules() if hasattr(module, "conv1d")]
    read = {getattr(mixer, name, None) for mixer in mixers for name in ("x_proj", "dt_proj", "out_proj")}
    users = Counter(id(layer.weight) for layer in layers.values())
    return [
        name
        for name, layer in layers.items()
        if layer in read
        or type(layer).forward not in (nn.Linear.forward, Conv1D.forward)
        or users[id(layer.weight)] > 1
    ]


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
    parts = (getattr(model.base_model, "prefix", "lora_"), "modules_to_save")
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


def merged(model):
    """(transformers model, state dict) to save: of a PEFT model with the adapters in the weights, and only there.

    A model without adapters comes back with None: its state is its own. The PEFT model stays as it is; the other one
    shares all weights with it that no adapter changes.
    """
    return _merged(model, lambda weight, changes: weight.detach().clone() if changes else weight.detach())


def merged_whole(model, *, zero=False):
    """`merged` of a PEFT model that FSDP2, or DeepSpeed's ZeRO if `zero`, has sharded: copies of whole weights.

    All processes must call. ZeRO-3 gathers the whole model on each of them for it, FSDP2 one weight at a time.
    """

    def whole(weight, changes):
        return weight.detach().full_tensor().cpu() if isinstance(weight, DTensor) else weight.detach().clone()

    with _gathered(model) if zero else contextlib.nullcontext():
        return _merged(model, whole)


@torch.no_grad()
def _merged(model, take):
    """As `merged`, of the tensors that `take(weight, changes)` gives; peft itself merges, in a twin of the model."""
    if not hasattr(model, "get_base_model"):
        return model, None
    twin = _twin(model, take, {}, False)
    base = twin.get_base_model()
    base.config = copy.deepcopy(base.config)  # peft notes there what is no longer tied
    base = twin.merge_and_unload()
    state = base.state_dict()
    for name, source in list(base.all_tied_weights_keys.items()):
        if state[name].data_ptr() != state[source].data_ptr():
            if base.config.tie_word_embeddings:
                raise ValueError(f"{name} is tied to {source}, and they would no longer be equal")
            del base.all_tied_weights_keys[name]
    return base, state


def _twin(module, take, made, adapted):
    """The same modules over again, with parameters of their own on the tensors that `take` gives, for peft to change.

    Args:
        made: the twins and tensors by what they are made of, so that what is shared stays so.
        adapted: the module stands below a wrapper of peft, which may add to its weights in place.
    """
    if id(module) in made:
        return made[id(module)]
    kind = type(module).__bases__[-1] if isinstance(module, FSDPModule) else type(module)
    made[id(module)] = twin = object.__new__(kind)
    own = {name: copy.copy(x) if isinstance(x, (dict, list, set)) else x for name, x in vars(module).items()}
    adapted = adapted or not {"base_layer", "original_module"}.isdisjoint(module._modules)

    def parameter(weight):
        if adapted:
            return nn.Parameter(take(weight, True), requires_grad=False)
        if id(weight) not in made:
            made[id(weight)] = take(weight, False)
        return nn.Parameter(made[id(weight)], requires_grad=False)

    for name, weight in module._parameters.items():
        own["_parameters"][name] = None if weight is None else parameter(weight)
    for name, child in module._modules.items():
        own["_modules"][name] = None if child is None else _twin(child, take, made, adapted)
    vars(twin).update(own)
    return twin


def _gathered(model):
    from deepspeed import zero

    return zero.GatheredParameters([weight for weight in model.parameters() if hasattr(weight, "ds_id")])


@torch.no_grad()
def check_merge(model, setting):
    """Try on a few tokens, before any training, that merged adapters do what the adapters do.

    The adapters get random weights for it, since new ones do nothing; they get their own back.

    Raises:
        ValueError: peft cannot merge them, or the merged model computes something else; the message names `setting`.
    """
    names, training = trained_names(model), model.training
    weights = {name: weight for name, weight in model.named_parameters() if name in names}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    model.eval()
    try:
        with torch.random.fork_rng():
            for weight in weights.values():
                weight.add_(torch.randn_like(weight) * weight.shape[-1] ** -0.5)
        adapted = _outputs(model)
        with model.disable_adapter():
            plain = _outputs(model)
        found = _outputs(merged(model)[0].eval())
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(f"{setting}: peft cannot merge the adapters ({' '.join(str(error).split())})") from error
    finally:
        for name, weight in weights.items():
            weight.copy_(before[name])
        model.train(training)
    effect, gap = (adapted - plain).norm(), (adapted - found).norm()
    rounds = model.dtype in (torch.bfloat16, torch.float16)  # as the merged weights do: only large effects can be seen
    if not gap <= (0.5 if rounds else 0.01) * effect and not (rounds and effect < 0.1 * plain.norm()):
        raise ValueError(
            f"{setting}: got {_shown(model.active_peft_config)}, whose merged weights are off by "
            f"{float(gap / effect):.0%} of what the adapters do; name other layers"
        )


def _outputs(model):
    """The logits, or scores, of a few tokens."""
    ids = torch.arange(1, 9, device=model.device)[None] % text_config(model).vocab_size
    return token_scores(model, ids) if is_classifier(model) else model(**model_inputs(model, ids)).logits.float()
