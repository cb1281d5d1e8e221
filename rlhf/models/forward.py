"""Running a model, wrapped or not: what its forward takes, its hidden states, and scores read at every position.

Every stage and PPO score through here, so a score means the same everywhere. A value model is a reward model read at
every position.
"""

import contextlib

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from rlhf_kernels import find_head
from rlhf_kernels.integrations.transformers import (
    ATTENTION,
    first_position,
    mask_for,
    packing_obstacle,
    takes_shared_prefix,
    use_shared_prefix_attention,
)
from rlhf_kernels.model_head import without_router_logits

from .parts import text_config, trunk, unwrapped


def position_ids_from_mask(attention_mask):
    """[B, T] mask, 1 = token -> [B, T] int64 positions that count the tokens from 0, wherever the padding stands."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)


def is_wrapped(model):
    """Whether only the model's own forward may run: in it DDP, FSDP2 and DeepSpeed gather weights, reduce gradients."""
    return isinstance(model, FSDPModule) or isinstance(getattr(model, "module", None), nn.Module)


def is_cut(model):
    """Whether FSDP2 has cut the weights of a network, be they whole now or not."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


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
        position_ids: [B, T] int64, from 0, wherever the model's own begin; None counts the tokens of the mask.
    """
    if position_ids is None:
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("position_ids: got None with a packed attention_mask, wants [B, T] positions")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        position_ids = position_ids_from_mask(mask)
    first, mask = first_position(model), mask_for(unwrapped(model), attention_mask)
    return {
        "input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids + first if first else position_ids,
        "use_cache": False, **without_router_logits(model),
    }  # fmt: skip


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
    return trunk(model)(**inputs).last_hidden_state


def _hidden_in_forward(model, *inputs):
    """`hidden_states`, of a language model that FSDP2 has cut by what its head reads in the model's own forward."""
    if not isinstance(model, FSDPModule):
        return hidden_states(model, *inputs)
    read, head = [], model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    try:
        model(**model_inputs(model, *inputs))
    finally:
        handle.remove()
    return read[0]


@contextlib.contextmanager
def _told(name, model):
    """What a model's own code raises at a text, as one line."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ValueError(
            f"{name}: a {type(unwrapped(model)).__name__}, which cannot be called with a text alone ({reason[0]})"
        ) from error


@torch.no_grad()
def check_causal(model, name="model"):
    """Raise where a language model looks at later tokens: two texts that part at their last token, in one batch.

    Raises:
        ValueError: their logits differ before it.
    """
    was_training = model.training
    model.eval()
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], device=model.device) % text_config(model).vocab_size
    with _told(name, model):
        logits = model(**model_inputs(model, ids)).logits[:, :-1].float()
    model.train(was_training)
    if (logits[0] - logits[1]).abs().max() > torch.finfo(model.dtype).eps ** 0.5 * logits.abs().max():
        raise ValueError(
            f"{name}: a {type(unwrapped(model)).__name__} that looks at later tokens (by its config it is no decoder), "
            "wants a causal language model"
        )


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
    ids = torch.arange(1, 8, device=model.device)[None] % text_config(model).vocab_size
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4]], device=model.device)
    mask = torch.ones(7, 7, dtype=torch.bool, device=model.device).tril()
    mask[5:, 3:5] = False
    packed = _hidden_in_forward(model, ids, mask[None, None], positions)[0]
    alone = [_hidden_in_forward(model, ids[:, rows])[0] for rows in ([0, 1, 2, 3, 4], [0, 1, 2, 5, 6])]
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

    That is where the head is more than a linear map and one LoRA adapter, or the model does more to its logits than
    a factor and a soft cap.
    """
    try:
        return find_head(model)
    except ValueError:
        return None


def score_head(model):
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear) and head.out_features == 1:
            return head
        if hasattr(head, "modules_to_save"):  # PEFT's wrapper around a head that trains in full
            return head
    raise ValueError(f"{type(model).__name__} has no linear scalar head named `score`, so it cannot be a reward model")


def _read_by(head, hidden):
    """A scalar head on hidden states, which some trunks give in fp32 whatever their weights are (Mamba)."""
    return head(hidden.to(head.weight.dtype))


def check_score_head(model, name="model"):
    """Raise unless the scores of a sequence classifier are a linear map of its trunk's hidden states at each token."""
    score_head(unwrapped(model))
    if is_wrapped(model):
        return
    was_training, ids, read = model.training, torch.arange(1, 4, device=model.device)[None], []
    model.eval()
    handle = score_head(unwrapped(model)).register_forward_pre_hook(lambda module, args: read.append(args[0]))
    try:
        with torch.no_grad(), _told(name, model):
            model(**model_inputs(model, ids))
            expected = hidden_states(model, ids).to(read[0].dtype)
    finally:
        handle.remove()
        model.train(was_training)
    if read[0].shape != expected.shape or not torch.allclose(read[0], expected, rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"{name}: a {type(unwrapped(model)).__name__} pools, or has more layers, in front of its scalar head, so "
            "no token has a score"
        )


def is_classifier(model):
    """Whether a model is a sequence classifier of transformers, as reward and value models are, of any labels."""
    inner = unwrapped(model)
    return type(inner).__name__.endswith("ForSequenceClassification") or hasattr(inner, "score")


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
        scores = _read_by(score_head(inner), hidden_states(model, input_ids, attention_mask, position_ids))
    return scores.squeeze(-1).float() - float(getattr(inner.config, "reward_bias", 0.0))


def _scores_in_forward(model, inputs):
    """[B, T, 1]: what the scalar head returns inside the model's own forward, before transformers pools it."""
    head, made = score_head(unwrapped(model)), []

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
