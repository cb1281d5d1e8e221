"""Loading, scoring and saving models. Every stage and PPO score through here, so a score means the same everywhere.

A reward model is a plain AutoModelForSequenceClassification checkpoint with one label. Its calibration is one number in
its config, `reward_bias`, which scoring subtracts. A value model is the same network read at every position.
"""

import contextlib
import json
import math
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import unset_hf_deepspeed_config

from rlhf_kernels import find_head
from rlhf_kernels.integrations.transformers import (
    ATTENTION,
    mask_for,
    packing_obstacle,
    takes_shared_prefix,
    use_shared_prefix_attention,
)

from .data import end_of_turn_id

DEMO_MODEL = Path(__file__).parent / "demo" / "base"
_DROPOUT_KEYS = ("resid_pdrop", "resid_dropout", "residual_dropout", "hidden_dropout", "hidden_dropout_prob")


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
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model path {name!r} holds a config.json that is not JSON ({error})") from None
    if config.get("model_type") not in transformers.CONFIG_MAPPING and not trust_remote_code:
        if config.get("auto_map"):
            raise ValueError(f"model {name!r} wants to run its own code; if you trust it, pass --trust_remote_code")
        raise ValueError(f"model {name!r} has the type {config.get('model_type')!r}, which transformers does not know")
    return folder


def _cached(name):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if name.startswith((".", "/", "~")):
        return None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


@contextlib.contextmanager
def quiet():
    """Keep back the table of missing weights and the progress bars of loading: what is missing is checked here."""
    loading = transformers.utils.logging
    level, bars = loading.get_verbosity(), loading.is_progress_bar_enabled()
    loading.set_verbosity_error()
    loading.disable_progress_bar()
    try:
        yield
    finally:
        loading.set_verbosity(level)
        if bars:
            loading.enable_progress_bar()


def load_tokenizer(path, *, pad_token=None, eos_token=None, trust_remote_code=False):
    """The tokenizer of a model folder, with a pad token and an EOS token.

    Args:
        path: as in `resolve_model_path`.
        pad_token, eos_token: set these; each must already be in the vocabulary. The pad token may equal EOS: padding is
            told by the mask everywhere, never by the id.
    Raises:
        ValueError: no tokenizer in the folder; no pad or EOS token; or the given one is not in the vocabulary.
    """
    folder = resolve_model_path(path, trust_remote_code=trust_remote_code)
    try:
        with quiet():
            options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"model path {str(path)!r} holds no tokenizer that can be read ({error})") from None
    for name, token in (("pad_token", pad_token), ("eos_token", eos_token)):
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise ValueError(f"{name}: got {token!r}, which is not a token of the tokenizer of {str(path)!r}")
            setattr(tokenizer, name, token)
        if getattr(tokenizer, f"{name}_id") is None:
            hint = f" (often: --pad_token '{tokenizer.eos_token}')" if tokenizer.eos_token else ""
            raise ValueError(
                f"the tokenizer of {str(path)!r} has no {name}; name one of its tokens with --{name}{hint}"
            )
    return tokenizer


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


def _load(auto_class, path, *, dtype, attn_implementation, trust_remote_code, **extra):
    """Load quietly, and return (model, names of the weights that the folder did not hold)."""
    folder = resolve_model_path(path, trust_remote_code=trust_remote_code)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
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
            model, info = auto_class.from_pretrained(folder, **options, **extra)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model {str(path)!r} cannot be loaded as {auto_class.__name__}: {error}") from None
    return model, sorted(info["missing_keys"])


def load_policy(path, *, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False, dropout=0.0):
    """A causal language model in train mode, with residual dropout `dropout` (0 in RL; paper: 0.2 in SFT), no other."""
    model, missing = _load(
        AutoModelForCausalLM,
        path,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    if missing:
        raise ValueError(f"model {str(path)!r} is not a complete language model: it lacks {', '.join(missing[:3])}")
    disable_dropout(model)
    if dropout:
        set_residual_dropout(model, dropout)
    return model.train()


def load_reward_model(path, *, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False):
    """A trained reward model, without dropout. Its calibration comes with it (`config.reward_bias`, 0 when absent)."""
    model, missing = _load(
        AutoModelForSequenceClassification,
        path,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    if missing:
        raise ValueError(
            f"model {str(path)!r} is not a reward model: it lacks {', '.join(missing[:3])} "
            "(train one with `rlhf reward --model_name_or_path ...`)"
        )
    if model.config.num_labels != 1:
        raise ValueError(f"model {str(path)!r} has {model.config.num_labels} labels, a reward model has 1")
    disable_dropout(model)
    if not hasattr(model.config, "reward_bias"):
        model.config.reward_bias = 0.0
    return model.train()


def reward_model_from_policy(
    policy_path, seed, *, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False, pad_token_id=None
):
    """A reward model to train: the policy's trunk under a new scalar head, drawn from N(0, 1/sqrt(d + 1)) with `seed`.

    1/sqrt(d + 1) is the standard deviation, d the hidden size (OpenAI's code; the paper's text leaves out the root).
    """
    model, missing = _load(
        AutoModelForSequenceClassification,
        policy_path,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        num_labels=1,
    )
    head = _score_head(model)
    head_name = next(name for name, module in model.named_modules() if module is head)
    if not set(missing) <= {f"{head_name}.weight", f"{head_name}.bias"}:
        raise ValueError(f"model {str(policy_path)!r} is not a complete language model: it lacks {missing[0]}")
    draw = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        head.weight.copy_(draw / math.sqrt(head.weight.shape[1] + 1))
        if head.bias is not None:
            head.bias.zero_()
    model.config.reward_bias = 0.0
    if pad_token_id is not None:
        model.config.pad_token_id = pad_token_id
    disable_dropout(model)
    return model.train()


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


def position_ids_from_mask(attention_mask):
    """[B, T] mask, 1 = token -> [B, T] int64 positions that count the tokens from 0, wherever the padding stands."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)


def unwrapped(model):
    """The transformers model inside DDP and PEFT wrappers (adapters sit in its modules, so they still take part)."""
    while hasattr(model, "module") and isinstance(model.module, nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_wrapped(model):
    """Whether only the model's own forward may run: in it DDP, FSDP2 and DeepSpeed gather weights, reduce gradients."""
    return isinstance(model, FSDPModule) or isinstance(getattr(model, "module", None), nn.Module)


def reshard(model):
    """Drop the whole weights that FSDP2 keeps behind a forward without a backward; a checkpoint loads into shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def model_inputs(model, input_ids, attention_mask=None, position_ids=None):
    """Keyword arguments of a forward of `model`, without a cache.

    Args:
        model: a model of transformers, possibly wrapped by DDP, FSDP2 or PEFT.
        input_ids: [B, T] int64.
        attention_mask: [B, T] with 1 = token; packed (then position_ids are needed): [B, 1, T, T] bool, or the layout
            [B, 1, 2, T] of `pack_responses`. None = all.
        position_ids: [B, T] int64; None counts the tokens of the mask.
    """
    if position_ids is None:
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("position_ids: got None with a packed attention_mask, wants [B, T] positions")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        position_ids = position_ids_from_mask(mask)
    mask = mask_for(unwrapped(model), attention_mask)
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids, "use_cache": False}


def hidden_states(model, input_ids, attention_mask=None, position_ids=None):
    """What the head of a model reads: the trunk's last hidden states, after its final norm.

    Args:
        model: a causal language model or a sequence classifier of transformers, possibly with adapters of PEFT, but in
            no other wrapper: the trunk is called without its head.
        input_ids, attention_mask, position_ids: as in `model_inputs`.
    Returns:
        [B, T, H] in the model's dtype. Differentiable.
    Raises:
        ValueError: the model is wrapped by DDP, FSDP2 or DeepSpeed.
    """
    if is_wrapped(model):
        raise ValueError(f"model: got one wrapped by {type(model).__name__}, which must run by its own forward")
    inputs = model_inputs(model, input_ids, attention_mask, position_ids)
    return unwrapped(model).base_model(**inputs).last_hidden_state


@torch.no_grad()
def supports_packing(model, longest=None):
    """Whether two responses behind one prompt, kept apart by a 4-D mask, get the hidden states that they get alone.

    False for another attention than SDPA, and where `packing_obstacle` finds one. The others try seven tokens.

    Args:
        longest: tokens of the longest prompt with its response; None = as many as the model takes.
    """
    config = model.config
    if config._attn_implementation not in ("sdpa", ATTENTION) or packing_obstacle(model, longest):
        return False
    was_training = model.training
    model.eval()
    ids = torch.arange(1, 8, device=model.device)[None] % config.vocab_size
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4]], device=model.device)
    mask = torch.ones(7, 7, dtype=torch.bool, device=model.device).tril()
    mask[5:, 3:5] = False
    packed = hidden_states(model, ids, mask[None, None], positions)[0]
    alone = [hidden_states(model, ids[:, rows])[0] for rows in ([0, 1, 2, 3, 4], [0, 1, 2, 5, 6])]
    model.train(was_training)
    gap = max((packed[:5] - alone[0]).abs().max(), (packed[5:] - alone[1][3:]).abs().max())
    return bool(gap <= 8 * torch.finfo(packed.dtype).eps ** 0.5 * packed.abs().max())


def share_prompts(models, longest=None):
    """Whether all these models can take packed rows; then they get the attention that needs no dense mask for them.

    Args:
        models: language or reward models; None entries are passed over.
        longest: as in `supports_packing`.
    """
    models = [model for model in models if model is not None]
    if not all(supports_packing(model, longest) for model in models):
        return False
    for model in filter(takes_shared_prefix, models):
        use_shared_prefix_attention(model, longest)
    return True


def linear_head(model):
    """The `rlhf_kernels.ModelHead` of a language model; None where its logits must be made.

    That is where the head is more than a linear map, as with adapters on it, or the model does more to its logits than
    a factor and a soft cap.
    """
    try:
        return find_head(model)
    except ValueError:
        return None


def _score_head(model):
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear) and head.out_features == 1:
            return head
        if hasattr(head, "modules_to_save"):  # PEFT's wrapper around a head that trains in full
            return head
    raise ValueError(f"{type(model).__name__} has no linear scalar head named `score`, so it cannot be a reward model")


def token_scores(model, input_ids, attention_mask=None, position_ids=None):
    """The score of a reward (or value) model read at every position, calibrated.

    Args:
        model: as `load_reward_model` gives it, possibly wrapped by PEFT, DDP or DeepSpeed, or sharded by FSDP2.
        input_ids, attention_mask, position_ids: as in `model_inputs`.
    Returns:
        [B, T] fp32: head(trunk) - config.reward_bias. Under mask 0 the entries mean nothing. Differentiable.
    """
    inner = unwrapped(model)
    if is_wrapped(model):
        scores = _scores_in_forward(model, model_inputs(model, input_ids, attention_mask, position_ids))
    else:
        scores = _score_head(inner)(hidden_states(model, input_ids, attention_mask, position_ids))
    return scores.squeeze(-1).float() - float(getattr(inner.config, "reward_bias", 0.0))


def _scores_in_forward(model, inputs):
    """[B, T, 1]: what the scalar head returns inside the model's own forward, before transformers pools it."""
    head, made = _score_head(unwrapped(model)), []

    def keep(module, args, scores):
        made.append(scores)
        return 0.0 * scores.nan_to_num(0.0, 0.0, 0.0)  # the model pools zeros: they show its wrapper the backward

    handle = head.register_forward_hook(keep)
    try:
        zeros = model(**inputs).logits
    finally:
        handle.remove()
    if made[0].shape[:-1] != inputs["input_ids"].shape:
        raise ValueError(
            f"{type(unwrapped(model)).__name__} pools in front of its scalar head, so no token has a score"
        )
    return made[0] + zeros.sum()


def sequence_scores(model, input_ids, attention_mask, last_index):
    """The reward of each row: `token_scores` at the given index of its last token (never found by looking for pad ids).

    Args:
        last_index: [B] int64, the position of each row's last token (EOS, or the last one kept).
    Returns:
        [B] fp32. Differentiable.
    """
    scores = token_scores(model, input_ids, attention_mask)
    return scores.gather(1, last_index.to(scores.device).unsqueeze(1)).squeeze(1)


def last_index_from_mask(attention_mask):
    """[B, T] mask, 1 = token -> [B] int64, the position of the last token of each row, padded on either side."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return torch.where(attention_mask.bool(), positions, -1).amax(dim=1)


def stop_token_ids(tokenizer, model, extra=None):
    """All ids that end a response: EOS of the tokenizer, every EOS of the model's generation config, the end of turn of
    the chat template, and `extra` (an id, a token, or a list of them). Sorted, without repeats.
    """
    generation = getattr(model, "generation_config", None)
    found = [tokenizer.eos_token_id, getattr(generation, "eos_token_id", None), end_of_turn_id(tokenizer), extra]
    ids = set()
    for entry in found:
        for token in entry if isinstance(entry, (list, tuple)) else [entry]:
            if isinstance(token, str):
                if token not in tokenizer.get_vocab():
                    raise ValueError(f"stop token: got {token!r}, which is not in the tokenizer's vocabulary")
                token = tokenizer.convert_tokens_to_ids(token)
            if token is not None:
                ids.add(int(token))
    return sorted(ids)


def save_model(model, tokenizer, directory, state_dict=None):
    """Write a model (safetensors), or another state of it, and its tokenizer; a reader sees all of it or none of it.

    Files are written aside and moved when all are there, config.json last; without it a folder is not a model. A disk
    that is full leaves the folder as it was.
    """
    from .checkpoint import atomic_directory

    while hasattr(model, "module") and isinstance(model.module, nn.Module):
        model = model.module
    with atomic_directory(directory) as folder, quiet():
        model.save_pretrained(folder, state_dict=state_dict)
        tokenizer.save_pretrained(folder)


def is_reward_model(path, trust_remote_code=False):
    """Whether a model folder holds a sequence classifier rather than a language model."""
    folder = resolve_model_path(path, trust_remote_code=trust_remote_code)
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    return any(name.endswith("ForSequenceClassification") for name in names)
