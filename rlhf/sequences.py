"""Prompts and responses joined as ids, and what the networks say about the response tokens."""

from dataclasses import dataclass

import torch

from rlhf_kernels import linear_cross_entropy, linear_logprobs, logprobs_and_entropy_from_logits

from .models import hidden_states, lm_head, token_scores


@dataclass
class Batch:
    """Prompts and responses joined and right-padded. `rows` are the flat positions that predict the response tokens."""

    input_ids: torch.Tensor  # [B, L]
    attention_mask: torch.Tensor  # [B, L] int64, 1 = keep
    response_mask: torch.Tensor  # [B, T] bool, 1 = keep
    rows: torch.Tensor  # [N] into [B * L]; row of the state before each response token
    labels: torch.Tensor  # [N]
    last_index: torch.Tensor  # [B] position of the last token

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[N] in the order of the response tokens -> [B, T], 0 under the mask."""
        return packed.new_zeros(self.response_mask.shape).masked_scatter(self.response_mask, packed)


def join(prompt_ids: list[list[int]], response_ids: list[list[int]], device="cpu", *, steps=None) -> Batch:
    """Join each prompt with its response as ids; nothing is decoded. T is `steps`, or else the longest response."""
    if not prompt_ids or len(prompt_ids) != len(response_ids):
        raise ValueError(f"response_ids: got {len(response_ids)}, want one for each of {len(prompt_ids)} prompts")
    if not all(prompt_ids):
        raise ValueError(f"prompt_ids: prompt {prompt_ids.index([])} is empty; every prompt needs at least one token")
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompt_ids, response_ids, strict=True)]
    width, steps = max(lengths), steps or max(1, max(map(len, response_ids)))
    input_ids = torch.zeros(len(lengths), width, dtype=torch.long)
    rows = []
    for b, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True)):
        input_ids[b, : lengths[b]] = torch.tensor(prompt + response)
        rows.append(torch.arange(len(response)) + (b * width + len(prompt) - 1))
    length = torch.tensor(lengths)
    response_length = torch.tensor([len(response) for response in response_ids])
    batch = Batch(
        input_ids,
        (torch.arange(width) < length[:, None]).long(),
        torch.arange(steps) < response_length[:, None],
        torch.cat(rows),
        torch.tensor([token for response in response_ids for token in response], dtype=torch.long),
        length - 1,
    )
    return Batch(*(tensor.to(device) for tensor in vars(batch).values()))


def response_log_probs(model, batch: Batch, *, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p of the response tokens and the entropy there, packed [N] fp32, nats; differentiable.

    Both belong to `softmax(logits / temperature)` over the full vocabulary. Where the logits are the linear head of the
    hidden states, they are never made as a whole.
    """
    try:
        weight, bias, softcap = lm_head(model)
    except ValueError:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return logprobs_and_entropy_from_logits(logits.flatten(0, 1)[batch.rows], batch.labels, temperature=temperature)
    hidden = hidden_states(model, batch.input_ids, batch.attention_mask)  # [B, L, H]
    return linear_logprobs(
        hidden.flatten(0, 1), weight, batch.labels, rows=batch.rows, bias=bias, temperature=temperature,
        softcap=softcap, return_entropy=True,
    )  # fmt: skip


def response_values(model, batch: Batch) -> torch.Tensor:
    """Return the value network's estimate at the state before each response token, packed [N] fp32; differentiable."""
    return token_scores(model, batch.input_ids, batch.attention_mask).flatten()[batch.rows]


def per_token_log_probs(model, prompt_ids, response_ids, *, temperature: float):
    """Return `(log_probs, mask, entropy)`, each [B, T], of the responses under `softmax(logits / temperature)`.

    Args:
        model: a causal LM; dropout is the caller's business.
        prompt_ids, response_ids: B lists of token ids; T is the longest response.
        temperature: > 0, the one that sampled.
    Returns:
        log_probs fp32 nats, 0 under the mask; mask bool, 1 = keep; entropy fp32 nats. Differentiable.
    """
    batch = join(prompt_ids, response_ids, model.device)
    log_probs, entropy = response_log_probs(model, batch, temperature=temperature)
    return batch.unpack(log_probs), batch.response_mask, batch.unpack(entropy)


def text_loss(model, texts: list[list[int]], *, num_items_in_batch) -> torch.Tensor:
    """Return the sum of -log p over the texts' tokens (each first one is context), divided by `num_items_in_batch`."""
    batch = join([ids[:1] for ids in texts], [ids[1:] for ids in texts], model.device)
    try:
        weight, bias, softcap = lm_head(model)
    except ValueError:
        return -response_log_probs(model, batch, temperature=1.0)[0].sum() / num_items_in_batch
    hidden = hidden_states(model, batch.input_ids, batch.attention_mask)  # [B, L, H]
    return linear_cross_entropy(
        hidden.flatten(0, 1), weight, batch.labels, rows=batch.rows, bias=bias, softcap=softcap,
        num_items_in_batch=num_items_in_batch,
    )  # fmt: skip
