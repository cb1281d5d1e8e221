"""Rows as batches of token ids, padded or packed, and the log-probs of their responses.

A batch holds rows of tokens and says which of their hidden states matter, so that padded rows and packed rows (a prompt
once, its responses behind it) go through one and the same loss.
"""

import itertools

import torch

from rlhf_kernels import pack_responses

from .. import data, models
from ..data.encoders import encode_rows
from ..models.sequences import label_log_probs

__all__ = ["batch_inputs", "batch_scores", "batch_values", "encode_rows", "make_batch", "response_log_probs"]


def make_batch(examples, pad_id, *, packed, hidden_size=768):
    """One forward pass over examples of `encode_rows`. Tokens that are not `learned` are read, and are no labels.

    Returns:
        input_ids [B, T]; position_ids [B, T]; attention_mask [B, T] bool, or if packed, for `models.model_inputs`:
        [B, 1, T, T] bool or the layout [B, 1, 2, T], whichever is faster on a CPU at this hidden_size; label_rows [N]
        and labels [N]: row b * T + t of the flat hidden states predicts that response token; last_token_rows [S]: the
        row of each response's last token; cu_groups [P+1]: prompt p owns the responses cu_groups[p] up to
        cu_groups[p+1]; cu_responses [S+1]: response s owns the labels cu_responses[s] up to cu_responses[s+1].
    """
    prompts, responses = [ex["prompt"] for ex in examples], [ex["responses"] for ex in examples]
    if packed:
        rows = pack_responses(prompts, responses, pad_token_id=pad_id)
        batch = rows._asdict()
        layout = batch.pop("layout")
        batch["attention_mask"] = layout if rows.two_part_is_faster(hidden_size) else rows.attention_mask
    else:
        batch = _padded(prompts, responses, pad_id)
    if any(mask for example in examples for mask in example.get("learned") or ()):
        batch.update(_learned(batch, examples))
    return batch


def _learned(batch, examples):
    """The labels of a batch that are learned, and which response each of them belongs to."""
    masks = []
    for example in examples:
        learned = example.get("learned") or [None] * len(example["responses"])
        masks += [mask or [True] * len(ids) for mask, ids in zip(learned, example["responses"], strict=True)]
    keep = torch.tensor(list(itertools.chain.from_iterable(masks)), dtype=torch.bool)
    kept = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
    fields = {name: batch[name][keep] for name in ("label_rows", "labels")}
    return {**fields, "cu_responses": kept[batch["cu_responses"]]}


def _padded(prompts, responses, pad_id):
    rows = [(prompt, ids) for prompt, group in zip(prompts, responses) for ids in group]
    input_ids, mask = data.pad_batch([prompt + ids for prompt, ids in rows], pad_id)
    width = input_ids.shape[1]
    starts = [row * width + len(prompt) - 1 for row, (prompt, _) in enumerate(rows)]
    label_rows = [torch.arange(start, start + len(ids)) for start, (_, ids) in zip(starts, rows)]
    return {
        "input_ids": input_ids,
        "position_ids": models.position_ids_from_mask(mask),
        "attention_mask": mask,
        "label_rows": torch.cat(label_rows),
        "labels": torch.tensor([token for _, ids in rows for token in ids]),
        "last_token_rows": torch.tensor([start + len(ids) for start, (_, ids) in zip(starts, rows)]),
        "cu_groups": torch.tensor([0] + [len(group) for group in responses]).cumsum(0),
        "cu_responses": torch.tensor([0] + [len(ids) for _, ids in rows]).cumsum(0),
    }


def response_log_probs(model, batch):
    """[N] fp32: log p of each response token of a batch, in nats; differentiable."""
    return label_log_probs(model, batch_inputs(batch), batch["labels"], batch["label_rows"])


def batch_values(model, batch):
    """What a stage reads of a batch, fp32: log p of each response token [N] in nats, or of a classifier the scores [S].

    Differentiable.
    """
    return (batch_scores if models.is_classifier(model) else response_log_probs)(model, batch)


def batch_scores(model, batch):
    """[S] fp32, the score of every response: the scalar head at each response's last token."""
    return models.token_scores(model, *batch_inputs(batch)).flatten()[batch["last_token_rows"]]


def batch_inputs(batch):
    """(input_ids, attention_mask, position_ids) of a batch of `make_batch`."""
    return batch["input_ids"], batch["attention_mask"], batch["position_ids"]
