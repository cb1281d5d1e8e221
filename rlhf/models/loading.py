"""Loading and saving models and tokenizers: local folders, safetensors only, no code of the model's unless asked.

A reward model is a plain AutoModelForSequenceClassification checkpoint with one label. Its calibration is one number in
its config, `reward_bias`, which scoring subtracts.
"""

import contextlib
import copy
import functools
import json
import math
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.integrations import unset_hf_deepspeed_config

from ..data import end_of_turn_ids, with_chat_template
from .adapters import merged
from .classifiers import classifier_of, saved_class
from .dropout import disable_dropout, set_residual_dropout
from .forward import check_causal, check_score_head, is_classifier, reshard, score_head
from .image_text import freeze_other_parts, language_auto_class, text_model
from .parts import quiet, refuse_compiled, text_config, trunk_name, unwrapped, without_weights
from .slices import fill, load_slices

DTYPES = ("float32", "bfloat16", "float16", "float64")
DEMO_MODEL = Path(__file__).parent.parent / "demo" / "base"


def resolve_model_path(path, *, trust_remote_code=False):
    """The local folder of a model: a folder, a name in the Hugging Face cache, or "demo" (the embedded model).

    Nothing is ever downloaded, no pickle is ever opened.

    Raises:
        ValueError: the model does not exist; has no config; holds only pickled weights; or needs code of its own to run
            and trust_remote_code is False. The message says what to do about it.
    """
    name = str(path)
    folder = DEMO_MODEL if name == "demo" else Path(name).expanduser()
    if not folder.is_dir():
        folder = _cached(name)
    if folder is None:
        raise ValueError(
            f"model path {name!r} does not exist: no such folder, and no such model in the Hugging Face cache "
            "(nothing is downloaded here; `hf download NAME` fetches a model by its name)"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"model path {name!r} holds no config.json, so it is not a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for end in ("*.bin", "*.pt", "*.pth", "*.pkl") for file in folder.glob(end))
        if pickles:
            raise ValueError(
                f"model path {name!r} holds pickled weights ({pickles[0]}), which can run code when they are opened; "
                "only safetensors are read: convert them once with save_pretrained where you trust them"
            )
        raise ValueError(f"model path {name!r} holds no weights (*.safetensors)")
    config = _read_settings(folder / "config.json", name)
    if (folder / "generation_config.json").is_file():
        _read_settings(folder / "generation_config.json", name)  # transformers would leave out one that it cannot read
    if config.get("model_type") not in transformers.CONFIG_MAPPING and not trust_remote_code:
        if config.get("auto_map"):
            raise ValueError(f"model {name!r} wants to run its own code; if you trust it, pass --trust_remote_code")
        raise ValueError(f"model {name!r} has the type {config.get('model_type')!r}, which transformers does not know")
    return folder


def _read_settings(file, name):
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model path {name!r} holds a {file.name} that is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"model path {name!r} holds a {file.name} with a {type(found).__name__}, wants a JSON object")
    return found


def _cached(name):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if name.startswith((".", "/", "~")):
        return None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def load_tokenizer(path, *, pad_token=None, eos_token=None, chat_template=None, trust_remote_code=False):
    """The tokenizer of a model folder, with a pad token and an EOS token.

    Args:
        path: as in `resolve_model_path`.
        pad_token, eos_token: set these; each must already be in the vocabulary. The pad token may equal EOS: padding is
            told by the mask everywhere, never by the id.
        chat_template: chatml, or a file with a template, which the tokenizer gets; see `data.with_chat_template`.
    Raises:
        ValueError: no tokenizer in the folder; no pad or EOS token; or the given one is not in the vocabulary; a
            template that cannot be used.
    """
    folder = resolve_model_path(path, trust_remote_code=trust_remote_code)
    try:
        with quiet():
            options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model path {str(path)!r} holds no tokenizer that can be read ({reason})") from None
    owner, tokens = f"the tokenizer of {str(path)!r}", {"pad_token": pad_token, "eos_token": eos_token}
    return with_tokens(tokenizer, owner, **tokens, chat_template=chat_template)


def with_tokens(tokenizer, owner="the tokenizer", *, pad_token=None, eos_token=None, chat_template=None):
    """The tokenizer with what is given, its pad and EOS token checked; errors as in `load_tokenizer`."""
    if not hasattr(tokenizer, "get_vocab"):
        raise ValueError(f"{owner}: got {type(tokenizer).__name__}, wants a tokenizer of transformers, or its path")
    for name, token in (("pad_token", pad_token), ("eos_token", eos_token)):
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise ValueError(f"{name}: got {token!r}, which is not a token of {owner}")
            setattr(tokenizer, name, token)
        if getattr(tokenizer, f"{name}_id") is None:
            hint = f" (often: --pad_token '{tokenizer.eos_token}')" if tokenizer.eos_token else ""
            raise ValueError(f"{owner} has no {name}; name one of its tokens with --{name}{hint}")
    return with_chat_template(tokenizer, chat_template)


@contextlib.contextmanager
def loaded_whole(deepspeed_plugin):
    """Load whole weights on each process, where ZeRO-3 would shard them meanwhile: they are tried and changed before.

    Args:
        deepspeed_plugin: of the TrainingArguments; None changes nothing.
    """
    if deepspeed_plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed_plugin.set_deepspeed_weakref()


def _config_of(path, trust_remote_code):
    folder = resolve_model_path(path, trust_remote_code=trust_remote_code)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"model {str(path)!r} has a config.json that cannot be read: {error}") from None


def _load(model_class, path, config, *, dtype, attn_implementation, trust_remote_code, cut=None, change=None):
    """Load quietly, and return (model, names of the weights that the folder did not hold).

    Args:
        cut, change: as in `load_slices`, which is tried first; a model that must load whole comes back unchanged.
    """
    folder = resolve_model_path(path, trust_remote_code=trust_remote_code)
    if attn_implementation is None and getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        attn_implementation = "eager"  # the one that caps
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype!r}, wants one of {', '.join(DTYPES)}")
        dtype = getattr(torch, dtype)
    if cut is not None:
        slices = {"dtype": dtype, "attn_implementation": attn_implementation, "change": change}
        with quiet():
            model = load_slices(model_class, folder, config, cut, **slices)
        if model is not None:
            return model, []
    options = {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
    }
    try:
        with quiet():
            model, info = model_class.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if attn_implementation is not None:
            _check_attention(model_class, config, attn_implementation)
        reason = " ".join(str(error).split())
        raise ValueError(f"model {str(path)!r} cannot be loaded as {model_class.__name__}: {reason}") from None
    return model, sorted(info["missing_keys"])


def _check_attention(model_class, config, attention):
    """Raise if it is its attention for which a model is refused, whatever its weights."""
    make = getattr(model_class, "from_config", None) or model_class._from_config
    try:
        without_weights(functools.partial(make, attn_implementation=attention), copy.deepcopy(config))
    except (ValueError, ImportError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        raise ValueError(
            f"attn_implementation: got {attention!r}, which this model does not take here ({reason}); leave it out "
            "for the best that the model has, or use --attn_implementation eager"
        ) from None


def _load_language_model(path, **options):
    """(language model, names of the weights that the folder did not hold); of an image-text model what text needs."""
    config = _config_of(path, options["trust_remote_code"])
    auto_class = language_auto_class(config)
    _check_loads_again(auto_class, config, f"model {str(path)!r}")
    model, missing = _load(auto_class, path, config, **options)
    if auto_class is AutoModelForImageTextToText and not missing:
        model = text_model(model, f"model {str(path)!r}")
    freeze_other_parts(model)
    return model, missing


def _check_loads_again(auto_class, config, name):
    if auto_class is None:
        raise ValueError(
            f"{name} has the type {config.model_type!r}, for which transformers has no causal language model that "
            "loads again once it is saved"
        )


def load_policy(path, *, dtype=torch.float32, attn_implementation=None, trust_remote_code=False, dropout=0.0, cut=None):
    """A causal language model in train mode, with residual dropout `dropout` (0 in RL; paper: 0.2 in SFT), no other.

    Of a model that takes images too, where AutoModelForCausalLM does not load it: its text model alone, or the whole.

    Args:
        path: as in `resolve_model_path`.
        attn_implementation: of transformers; None = SDPA where the model supports it, else eager.
        cut: as in `rlhf.models.slices.load_slices`: each process reads its own slices, where that can be done; where
            not, the model comes back whole. None = whole.
    Raises:
        ValueError: as `resolve_model_path`; the model cannot be loaded; it lacks weights; it does not support
            `attn_implementation`.
    """
    options = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    model, missing = _load_language_model(path, cut=cut, **options)
    if missing:
        raise ValueError(f"model {str(path)!r} is not a complete language model: it lacks {', '.join(missing[:3])}")
    return as_policy(model, f"model {str(path)!r}", dropout=dropout)


def as_policy(model, name="model", *, dropout=0.0):
    """A causal language model that is there already, in the state in which `load_policy` gives one; it is changed.

    Args:
        name: what it is called in messages.
    """
    refuse_compiled(model, name)
    is_module = isinstance(model, nn.Module) and hasattr(model, "get_output_embeddings")
    if not is_module or unwrapped(model).get_output_embeddings() is None:
        raise ValueError(
            f"{name}: got {type(model).__name__}, wants a causal language model of transformers, or its path"
        )
    config = unwrapped(model).config
    if type(config).__module__.startswith("transformers."):
        _check_loads_again(language_auto_class(config), config, name)
    check_causal(model, name)
    reshard(model)
    disable_dropout(model)
    if dropout:
        set_residual_dropout(model, dropout)
    return model.train()


def load_reward_model(path, *, dtype=torch.float32, attn_implementation=None, trust_remote_code=False, cut=None):
    """A trained reward model, without dropout. Its calibration comes with it (`config.reward_bias`, 0 when absent).

    Args:
        path, attn_implementation, cut: as in `load_policy`.
    """
    config = _config_of(path, trust_remote_code)
    model_class = saved_class(config, config.architectures or ())
    if model_class is None:
        raise ValueError(
            f"model {str(path)!r} is not a reward model: it is a {' or '.join(config.architectures or ['model'])} "
            "(train one with `rlhf reward --model_name_or_path ...`)"
        )
    model, missing = _load(
        model_class,
        path,
        config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        cut=cut,
    )
    if missing:
        raise ValueError(
            f"model {str(path)!r} is not a reward model: it lacks {', '.join(missing[:3])} "
            "(train one with `rlhf reward --model_name_or_path ...`)"
        )
    return as_reward_model(model, f"model {str(path)!r}")


def as_reward_model(model, name="reward_model"):
    """A sequence classifier that is there already, in the state in which `load_reward_model` gives one; it is changed.

    Args:
        name: what it is called in messages.
    """
    refuse_compiled(model, name)
    if not isinstance(model, nn.Module) or not is_classifier(model):
        raise ValueError(f"{name}: got {type(model).__name__}, wants a sequence classifier of transformers")
    if model.config.num_labels != 1:
        raise ValueError(f"{name} has {model.config.num_labels} labels, a reward model has 1")
    check_score_head(model, name)
    reshard(model)
    disable_dropout(model)
    if not hasattr(model.config, "reward_bias"):
        model.config.reward_bias = 0.0
    return model.train()


def reward_model_from_policy(
    policy, seed, *, dtype=torch.float32, attn_implementation=None, trust_remote_code=False, pad_token_id=None, cut=None
):
    """A reward model to train: the policy's trunk under a new scalar head, drawn from N(0, 1/sqrt(d + 1)) with `seed`.

    1/sqrt(d + 1) is the standard deviation, d the hidden size (OpenAI's code; the paper's text leaves out the root).

    Args:
        policy: path of a language model, or the model itself, whose weights are copied in its own dtype (adapters of
            PEFT merged into them). Any architecture: see `rlhf.models.classifiers`.
        cut: as in `load_policy`, of a path.
    """
    if isinstance(policy, nn.Module):
        refuse_compiled(policy, "model")
        language_model = _copy_of(policy)
    else:
        options = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
        language_model, missing = _load_language_model(policy, cut=cut, change=classifier_of, **options)
        missing = [weight for weight in missing if weight.startswith(f"{trunk_name(language_model)}.")]
        if missing:
            raise ValueError(f"model {str(policy)!r} is not a complete language model: it lacks {missing[0]}")
    model = language_model if is_classifier(language_model) else classifier_of(language_model)
    head = score_head(model)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(head.weight.shape, generator=generator, dtype=torch.float32)
    with torch.no_grad():
        fill(head.weight, draw / math.sqrt(head.weight.shape[1] + 1))
        if head.bias is not None:
            head.bias.zero_()
    model.config.reward_bias = 0.0
    if pad_token_id is not None:
        model.config.pad_token_id = text_config(model).pad_token_id = pad_token_id
    return as_reward_model(model)


def _copy_of(policy):
    """A language model of the same weights, those of its adapters merged into them."""
    base, state = merged(policy)
    options = {"dtype": base.dtype, "attn_implementation": base.config._attn_implementation}
    with torch.random.fork_rng(), quiet():
        copied = type(base)._from_config(copy.deepcopy(base.config), **options).to(base.device)
    copied.load_state_dict(base.state_dict() if state is None else state)
    return copied


def stop_token_ids(tokenizer, model, extra=None):
    """All ids that end a response: EOS of the tokenizer, each EOS of the model's generation config, what ends a turn in
    the chat template, and `extra` (an id, a token, or a list of them). Sorted, without repeats.
    """
    generation = getattr(model, "generation_config", None)
    found = [tokenizer.eos_token_id, getattr(generation, "eos_token_id", None), end_of_turn_ids(tokenizer), extra]
    ids = set()
    for entry in found:
        for token in entry if isinstance(entry, (list, tuple)) else [entry]:
            if isinstance(token, str):
                if token not in tokenizer.get_vocab():
                    raise ValueError(f"stop token: got {token!r}, which is not in the tokenizer's vocabulary")
                token = tokenizer.convert_tokens_to_ids(token)
            if token is not None:
                ids.add(int(token))
    most = len(tokenizer)
    for token in extra if isinstance(extra, (list, tuple)) else [extra]:
        if isinstance(token, int) and not 0 <= token < most:
            raise ValueError(f"stop token: got the id {token}, the tokenizer has the ids 0 to {most - 1}")
    return sorted(ids)


def is_reward_model(path, trust_remote_code=False):
    """Whether a model folder holds a sequence classifier rather than a language model."""
    folder = resolve_model_path(path, trust_remote_code=trust_remote_code)
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    return any(name.endswith("ForSequenceClassification") for name in names)
