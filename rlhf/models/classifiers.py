"""Reward models of every architecture: a language model's trunk under a scalar head that reads each token.

transformers' own ...ForSequenceClassification is taken where it is that and no more. Where there is none, or one that
pools first or has layers of its own in its head (BERT, RoBERTa, BART, XLNet), a class is made from the language
model's: the trunk as the language model builds it, under its own name, and `score`, a linear map without a bias. The
checkpoint is what transformers' GenericForSequenceClassification writes; `config.architectures` names the class.
"""

import copy
import functools
import re

import torch
import transformers
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .image_text import language_auto_class
from .parts import brings_code, hidden_size, trunk_name, without_weights

SUFFIX = "ForSequenceClassification"


class TrunkClassifier:
    """What the classes that `classifier_class` makes have in common; the other base is a PreTrainedModel."""

    language_model_class = None
    embeddings_name = None

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        language_model = self.language_model_class(config)
        setattr(self, self.base_model_prefix, getattr(language_model, self.base_model_prefix))
        self.score = nn.Linear(hidden_size(language_model), self.num_labels, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.get_submodule(self.embeddings_name)

    def set_input_embeddings(self, value):
        self.set_submodule(self.embeddings_name, value)

    def get_output_embeddings(self):
        return None

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None, **kwargs
    ):
        """Scores [B, num_labels] at each row's last token: by the mask [B, T], else the last that is no pad token."""
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "inputs_embeds": inputs_embeds, "use_cache": False, **kwargs,
        }  # fmt: skip
        outputs = self.base_model(**{name: value for name, value in inputs.items() if value is not None})
        hidden = outputs.last_hidden_state.to(self.score.weight.dtype)  # Mamba's trunk gives fp32 under bf16 weights
        scores = self.score(hidden)
        kept = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device)
        if attention_mask is not None and attention_mask.dim() == 2:
            kept = attention_mask.bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            kept = input_ids != self.config.pad_token_id
        last = (kept * torch.arange(scores.shape[1], device=scores.device)).argmax(-1)
        pooled = scores[torch.arange(len(scores), device=scores.device), last]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=scores, labels=labels, pooled_logits=pooled, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=pooled, hidden_states=outputs.get("hidden_states"), attentions=outputs.get("attentions")
        )


def classifier_name(language_model_class):
    """The name of the class that `classifier_class` makes, which is not that of one of transformers' own."""
    stem = re.sub(r"(Model)?(For|LMHead|WithLMHead|LMHeadModel)([A-Z]\w*)?$", "", language_model_class.__name__)
    name = stem + SUFFIX
    return f"{stem}Causal{SUFFIX}" if hasattr(transformers, name) else name


@functools.cache
def classifier_class(language_model_class, trunk, embeddings):
    """A sequence classifier over the trunk of a class of language models.

    Args:
        trunk, embeddings: names of the trunk and of the input embeddings in a language model of that class.
    """
    base = next(
        base
        for base in language_model_class.__mro__[1:]
        if issubclass(base, PreTrainedModel) and not base.can_generate()
    )
    attributes = {
        "language_model_class": language_model_class,
        "config_class": language_model_class.config_class,
        "base_model_prefix": trunk,
        "embeddings_name": embeddings,
        "__module__": language_model_class.__module__,  # where transformers looks what its attention can do
    }
    return type(classifier_name(language_model_class), (TrunkClassifier, base), attributes)


def _made_class(language_model):
    embeddings = language_model.get_input_embeddings()
    embeddings = next(name for name, module in language_model.named_modules() if module is embeddings)
    return classifier_class(type(language_model), trunk_name(language_model), embeddings)


def saved_class(config, architectures):
    """The class that loads a saved classifier: a made one where its name is among `architectures`, else transformers'.

    Args:
        config: the checkpoint's; architectures: names of classes in it.
    Returns:
        A class with from_pretrained; None where neither is there.
    """
    auto_class = language_auto_class(config)
    if auto_class is not None and type(config) in auto_class._model_mapping:
        language_model_class = auto_class._model_mapping[type(config)]
        if classifier_name(language_model_class) in architectures:
            return _made_class(without_weights(language_model_class, copy.deepcopy(config)))
    known = brings_code(config) or type(config) in AutoModelForSequenceClassification._model_mapping
    return AutoModelForSequenceClassification if known else None


def classifier_of(language_model):
    """A classifier of one label over the trunk of a language model, which is taken out of it; its head is not drawn."""
    config = language_model.config
    config.num_labels = 1
    model = _own_classifier(language_model) or without_weights(_made_class(language_model), config)
    setattr(model, model.base_model_prefix, getattr(language_model, trunk_name(language_model)))
    for head in _heads(model):
        head.to_empty(device=language_model.device).to(language_model.dtype)
    return model


def _own_classifier(language_model):
    """transformers' classifier, without weights, where it is the language model's trunk under a linear head."""
    config, mapping = language_model.config, AutoModelForSequenceClassification._model_mapping
    if brings_code(language_model):
        if "AutoModelForSequenceClassification" not in config.auto_map:
            raise ValueError(
                f"model: {type(language_model).__name__} has code of its own and no AutoModelForSequenceClassification "
                "in it (config.auto_map), so a reward model of it could not be loaded again"
            )
        reference = config.auto_map["AutoModelForSequenceClassification"]
        own_class = get_class_from_dynamic_module(reference, config._name_or_path, local_files_only=True)
    elif type(config) in mapping:
        own_class = mapping[type(config)]
    else:
        return None
    trunk = getattr(language_model, trunk_name(language_model))
    model = without_weights(own_class, config)
    own = getattr(model, trunk_name(model))
    same = type(own) is type(trunk) and own.state_dict().keys() == trunk.state_dict().keys()
    return model if same and [type(head) for head in _heads(model)] == [nn.Linear] else None


def _heads(model):
    """What stands beside a classifier's trunk and has weights."""
    beside = (child for name, child in model.named_children() if name != trunk_name(model))
    return [child for child in beside if any(True for _ in child.parameters())]
