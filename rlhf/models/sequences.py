"""Prompts and responses joined as ids, and what the networks say about the response tokens."""

from dataclasses import dataclass

import torch

from rlhf_kernels import (
    call_with_head,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_loss,
    logprobs_and_entropy_from_logits,
    logprobs_from_logits,
    pack_responses,
)
from rlhf_kernels import policy_loss as of_tokens

from .forward import linear_head, model_inputs, token_scores


@dataclass
class Batch:
    """Prompts and responses joined: a row for each response, or equal prompts once. R = B * L flat positions."""

    input_ids: torch.Tensor  # [B, L]
    position_ids: torch.Tensor  # [B, L]
    attention_mask: torch.Tensor  # [B, L] int64, 1 = keep; or of packed rows, as `models.model_inputs` takes it
    response_mask: torch.Tensor  # [S, T] bool, 1 = keep
    rows: torch.Tensor  # [N] into [R]; row of the state before each response token
    labels: torch.Tensor  # [N] the response tokens
    last_rows: torch.Tensor  # [S] into [R]; row of each response's last token

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(input_ids, attention_mask, position_ids), as the functions of `models` take them."""
        return self.input_ids, self.attention_mask, self.position_ids

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[N] in the order of the response tokens -> [S, T], 0 under the mask."""
        return packed.new_zeros(self.response_mask.shape).masked_scatter(self.response_mask, packed)


def join(
    prompt_ids: list[list[int]], response_ids: list[list[int]], device="cpu", *, steps=None, share_width=None
) -> Batch:
    """Join each prompt with its response as ids; nothing is decoded.

    Args:
        prompt_ids, response_ids: S lists of ids; a response may be empty, a prompt not.
        steps: T; None = the longest response.
        share_width: hidden size of models that can take packed rows; equal prompts are then computed once, where that
            is less work. None: a row for each response.
    """
    if not prompt_ids or len(prompt_ids) != len(response_ids):
        raise ValueError(f"response_ids: got {len(response_ids)}, want one for each of {len(prompt_ids)} prompts")
    if not all(prompt_ids):
        raise ValueError(f"prompt_ids: prompt {prompt_ids.index([])} is empty; every prompt needs at least one token")
    groups = {}
    for index, prompt in enumerate(prompt_ids):
        groups.setdefault(tuple(prompt), []).append(index)
    shared = [(len(prompt), [len(response_ids[i]) for i in group]) for prompt, group in groups.items()]
    if share_width and len(groups) < len(prompt_ids) and packing_pays(shared, share_width):
        fields = _shared(groups, response_ids, share_width)
    else:
        fields = _row_each(prompt_ids, response_ids)
    lengths = torch.tensor([len(response) for response in response_ids])
    labels = torch.tensor([token for response in response_ids for token in response], dtype=torch.long)
    mask = torch.arange(steps or max(1, int(lengths.max()))) < lengths[:, None]
    fields |= {"response_mask": mask, "labels": labels}
    return Batch(**{name: tensor.to(device) for name, tensor in fields.items()})


def _row_each(prompt_ids, response_ids):
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompt_ids, response_ids, strict=True)]
    width = max(lengths)
    input_ids = torch.zeros(len(lengths), width, dtype=torch.long)
    rows = []
    for b, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True)):
        input_ids[b, : lengths[b]] = torch.tensor(prompt + response)
        rows.append(torch.arange(len(response)) + (b * width + len(prompt) - 1))
    length = torch.tensor(lengths)
    mask = (torch.arange(width) < length[:, None]).long()
    return {
        "input_ids": input_ids,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "attention_mask": mask,
        "rows": torch.cat(rows),
        "last_rows": length - 1 + width * torch.arange(len(lengths)),
    }


def _shared(groups, response_ids, width):
    """One block for each prompt, by its first response; rows and last_rows in the order of the responses."""
    order = [index for group in groups.values() for index in group]
    packed = pack_responses(
        [list(prompt) for prompt in groups], [[response_ids[i] for i in group] for group in groups.values()]
    )
    pieces = packed.label_rows.split(packed.cu_responses.diff().tolist())
    back = torch.tensor(order).argsort()
    return {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids,
        "attention_mask": packed.layout if packed.two_part_is_faster(width) else packed.attention_mask,
        "rows": torch.cat([pieces[i] for i in back.tolist()]),
        "last_rows": packed.last_token_rows[back],
    }


def packing_pays(groups: list[tuple[int, list[int]]], hidden_size: int) -> bool:
    """Whether packed rows take less arithmetic than padded ones; groups: (prompt tokens, tokens of each response).

    A layer of width H takes about 24 H^2 operations a token in its matrices and 4 H T in its attention over rows of T
    tokens, so N tokens cost as N * (6 H + T). Packing saves tokens and makes longer rows.
    """
    blocks = [prompt + sum(responses) for prompt, responses in groups]
    rows = [prompt + response for prompt, responses in groups for response in responses]
    block, row = max(blocks), max(rows)
    return -(-sum(blocks) // block) * block * (6 * hidden_size + block) < len(rows) * row * (6 * hidden_size + row)


def by_length(prompt_ids: list[list[int]], response_ids: list[list[int]], rows=None) -> list[int]:
    """The rows (None = all) by length, those of equal prompts next to each other: little padding, prompts to share."""
    rows = range(len(prompt_ids)) if rows is None else rows
    length = {row: len(prompt_ids[row]) + len(response_ids[row]) for row in rows}
    groups = {}
    for row in rows:
        groups.setdefault(tuple(prompt_ids[row]), []).append(row)
    groups = sorted(groups.values(), key=lambda group: max(length[row] for row in group))
    return [row for group in groups for row in sorted(group, key=length.__getitem__)]


def cheapest_cut(lengths: list[int], size: int, overhead: int) -> list[int]:
    """Where to end chunks of rows, at most `size` rows each, for the fewest tokens: rows are padded to the longest of
    their chunk, and a chunk costs as much as `overhead` tokens besides.
    """
    best, starts = [0], [0]  # over the first n rows: the cost, and where the last chunk starts
    for end in range(1, len(lengths) + 1):
        costs, longest = {}, 0
        for start in range(end - 1, max(end - size, 0) - 1, -1):
            longest = max(longest, lengths[start])
            costs[start] = best[start] + (end - start) * longest + overhead
        starts.append(min(costs, key=costs.get))
        best.append(costs[starts[-1]])
    ends, end = [], len(lengths)
    while end:
        ends, end = [end, *ends], starts[end]
    return ends


def label_log_probs(model, inputs, labels, rows, *, temperature=1.0, return_entropy=False):
    """log p of labels [N] under `softmax(logits / temperature)`, in nats; differentiable.

    Where the logits are the linear head of the hidden states, they are never made as a whole.

    Args:
        model: a causal LM, possibly wrapped.
        inputs: (input_ids, attention_mask, position_ids) as `models.model_inputs` takes them.
        labels, rows: [N] tokens, and the flat positions that predict them.
    Returns:
        [N] fp32; with return_entropy (log-probs, entropies).
    """
    inputs = model_inputs(model, *inputs)

    def of_hidden(hidden, head):
        return linear_logprobs(
            hidden.flatten(0, 1), head.weight, labels, rows=rows, bias=head.bias, return_entropy=return_entropy,
            **head.options(temperature),
        )  # fmt: skip

    if linear_head(model) is not None:
        return call_with_head(model, of_hidden, **inputs)
    logits = model(**inputs).logits.flatten(0, 1)[rows]
    log_probs, entropy = logprobs_and_entropy_from_logits(logits, labels, temperature=temperature)
    return (log_probs, entropy) if return_entropy else log_probs


def aligned_log_probs(model, inputs, labels, rows):
    """log p of labels [N], differentiable, and log p - log sum p^2, a constant: what WPO's weights are means of.

    Arguments as in `label_log_probs`. sum p^2 is p(label)^2 over the label's probability at half the temperature.
    """
    inputs = model_inputs(model, *inputs)

    def of_hidden(hidden, head):
        found = []
        for part, temperature in ((hidden, 1.0), (hidden.detach(), 0.5)):
            options = {"bias": head.bias, **head.options(temperature)}
            found.append(linear_logprobs(part.flatten(0, 1), head.weight, labels, rows=rows, **options))
        return tuple(found)

    if linear_head(model) is not None:
        log_probs, halved = call_with_head(model, of_hidden, **inputs)
    else:
        logits = model(**inputs).logits.flatten(0, 1)[rows]
        log_probs = logprobs_from_logits(logits, labels)
        halved = logprobs_from_logits(logits.detach(), labels, temperature=0.5)
    return log_probs, (halved - log_probs).detach()


def label_loss(model, inputs, labels, rows, **options) -> torch.Tensor:
    """Cross-entropy of labels [N], with the gradients made in the forward; arguments as in `label_log_probs`.

    Args:
        options: reduction ("mean" or "sum") and num_items_in_batch, as in `rlhf_kernels.linear_cross_entropy`.
    """
    if linear_head(model) is None:
        loss, items = -label_log_probs(model, inputs, labels, rows).sum(), options.get("num_items_in_batch")
        return loss if options.get("reduction") == "sum" else loss / (len(labels) if items is None else items)

    def of_hidden(hidden, head):
        return linear_cross_entropy(
            hidden.flatten(0, 1), head.weight, labels, rows=rows, bias=head.bias, **head.options(), **options
        )

    return call_with_head(model, of_hidden, **model_inputs(model, *inputs))


def response_log_probs(model, batch: Batch, *, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p of the response tokens and the entropy there, packed [N] fp32, nats; differentiable.

    Both belong to `softmax(logits / temperature)` over the full vocabulary.
    """
    return label_log_probs(model, batch.inputs, batch.labels, batch.rows, temperature=temperature, return_entropy=True)


def policy_loss(model, batch: Batch, old_log_probs, advantages, *, temperature, entropy_coef=0.0, **options):
    """The policy loss of the responses of a batch, with the gradients made in the forward.

    Args:
        old_log_probs, advantages: [S, T], what stands under the mask may be anything.
        temperature: > 0, the one that sampled.
        options: objective, kl, ..., num_items_in_batch, as in `rlhf_kernels.linear_policy_loss`.
    Returns:
        `rlhf_kernels.PolicyLoss`; its `loss` is differentiable.
    """
    mask = batch.response_mask
    if linear_head(model) is None:
        log_probs, entropy = (batch.unpack(x) for x in response_log_probs(model, batch, temperature=temperature))
        return of_tokens(
            log_probs, old_log_probs, advantages, mask, entropy=entropy, entropy_coef=entropy_coef, **options
        )

    found = []

    def of_hidden(hidden, head):
        found.append(linear_policy_loss(
            hidden.flatten(0, 1), head.weight, batch.unpack(batch.labels), old_log_probs, advantages, mask,
            rows=batch.unpack(batch.rows), bias=head.bias, entropy_coef=entropy_coef, **head.options(temperature),
            **options,
        ))  # fmt: skip
        return found[0].loss

    loss = call_with_head(model, of_hidden, **model_inputs(model, *batch.inputs))
    return found[0]._replace(loss=loss)


def response_values(model, batch: Batch) -> torch.Tensor:
    """Return the value network's estimate at the state before each response token, packed [N] fp32; differentiable."""
    return token_scores(model, *batch.inputs).flatten()[batch.rows]


def response_scores(model, batch: Batch) -> torch.Tensor:
    """Return the reward of each response, [S] fp32: the score at its last token; differentiable."""
    return token_scores(model, *batch.inputs).flatten()[batch.last_rows]


def per_token_log_probs(model, prompt_ids, response_ids, *, temperature: float, share_width=None):
    """Return `(log_probs, mask, entropy)`, each [B, T], of the responses under `softmax(logits / temperature)`.

    Args:
        model: a causal LM; dropout is the caller's business.
        prompt_ids, response_ids: B lists of token ids; T is the longest response.
        temperature: > 0, the one that sampled.
        share_width: as in `join`.
    Returns:
        log_probs fp32 nats, 0 under the mask; mask bool, 1 = keep; entropy fp32 nats. Differentiable.
    """
    batch = join(prompt_ids, response_ids, model.device, share_width=share_width)
    log_probs, entropy = response_log_probs(model, batch, temperature=temperature)
    return batch.unpack(log_probs), batch.response_mask, batch.unpack(entropy)


def text_loss(model, texts: list[list[int]], *, num_items_in_batch) -> torch.Tensor:
    """Return the sum of -log p over the texts' tokens (each first one is context), divided by `num_items_in_batch`."""
    batch = join([ids[:1] for ids in texts], [ids[1:] for ids in texts], model.device)
    return label_loss(model, batch.inputs, batch.labels, batch.rows, num_items_in_batch=num_items_in_batch)
