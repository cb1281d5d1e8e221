"""Language models out of checkpoints that take images too: their text model alone, or the whole, called with text."""

import copy
import logging

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from .parts import brings_code, text_config, trunk, trunk_name, without_weights

logger = logging.getLogger("rlhf")


def language_auto_class(config):
    """The auto class that loads the language model in a checkpoint, and loads again what is saved of it.

    Returns:
        AutoModelForCausalLM; AutoModelForImageTextToText where transformers has no causal language model for `config`,
        or one that is saved under a config of its text alone for which there is none; None where neither knows it.
    """
    if brings_code(config):
        return AutoModelForCausalLM
    causal, text = AutoModelForCausalLM._model_mapping, config.get_text_config(decoder=True)
    if type(config) in causal:
        saved = getattr(causal[type(config)], "config_class", None)
        if text is config or saved is not type(text) or type(text) in causal:
            return AutoModelForCausalLM
    return AutoModelForImageTextToText if type(config) in AutoModelForImageTextToText._model_mapping else None


def text_model(whole, name):
    """The language model to train in an image-text model: its text model alone if transformers has a class for that.

    The class must give the same logits to a text. Otherwise it is the whole model, if it can be called with text.

    Args:
        name: what it is called in messages.
    Raises:
        ValueError: neither.
    """
    kind, expected, found = type(whole).__name__, _logits(whole), _alone(whole)
    logits = None if found is None else _logits(found)
    if isinstance(logits, torch.Tensor) and (
        isinstance(expected, Exception) or torch.allclose(logits, expected, rtol=1e-3, atol=1e-3)
    ):
        own = type(found).__name__
        logger.warning("%s is a %s: its text model is taken out of it, and saved, as a %s", name, kind, own)
        return found
    if isinstance(expected, Exception):
        raise ValueError(f"{name} is a {kind}, which cannot be called with text alone ({expected})")
    logger.warning("%s is a %s: it is trained and saved as a whole, on text alone", name, kind)
    return whole


def freeze_other_parts(model):
    """Freeze what a text does not reach in a model that takes images too, such as its vision tower."""
    decoder = model.get_decoder() if text_config(model) is not model.config else model
    if decoder is model or model.get_input_embeddings() not in decoder.modules():
        return
    reached = {id(weight) for part in (decoder, model.get_output_embeddings()) for weight in part.parameters()}
    for weight in model.parameters():
        if id(weight) not in reached:
            weight.requires_grad_(False)


def _alone(whole):
    """The decoder and the head of `whole` in the class of transformers for a causal model of its text; else None."""
    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    mapping = AutoModelForCausalLM._model_mapping
    if head is None or decoder is whole or type(getattr(decoder, "config", None)) not in mapping:
        return None
    config = copy.deepcopy(decoder.config)
    config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    model = without_weights(mapping[type(config)], config)
    if type(trunk(model)) is not type(decoder) or model.get_output_embeddings() is None:
        return None
    setattr(model, trunk_name(model), decoder)
    model.set_output_embeddings(head)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return None
    decoder.config.tie_word_embeddings = config.tie_word_embeddings
    model.config, model.generation_config = decoder.config, whole.generation_config
    return model.train(whole.training)


@torch.no_grad()
def _logits(model):
    """Logits of a short text in eval mode, or why the model cannot be called with a text."""
    was_training, ids = model.training, torch.arange(1, 8, device=model.device)[None]
    model.eval()
    try:
        return model(input_ids=ids % text_config(model).vocab_size, use_cache=False).logits.float()
    except Exception as error:  # of the model's own code, where it wants what a text does not have
        return error
    finally:
        model.train(was_training)
