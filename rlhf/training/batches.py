"""Rows as batches of token ids, padded or packed, and the log-probs of their responses.

A batch holds rows of tokens and says which of their hidden states matter, so that padded rows and packed rows (a prompt
once, its responses behind it) go through one and the same loss.
"""

import logging

import torch

from rlhf_kernels import pack_responses

from .. import data, models
from ..data import rankings
from ..models.sequences import label_log_probs

logger = logging.getLogger("rlhf")


def encode_rows(tokenizer, rows, names, args, *, what):
    """Ids of each row's prompt and completions: {"prompt": ids, "responses": [ids, ...], "row": row}.

    All completions of a row get the same prompt, cut on the left so that the longest completion fits. A row with a
    completion that does not fit is dropped (of a ranking, that completion only, as long as a pair is left). Both are
    counted and told.

    Args:
        names: fields that hold completions, or one field that holds a list of them.
        what: the name of these rows in messages.
    Raises:
        ValueError: no row is left; a long prompt under long_prompts="error".
    """
    encoded, dropped, cut = [], 0, 0
    for row in rows:
        prompt, responses = _encode_row(tokenizer, row, names)
        if not prompt:
            raise data.DataError(f"{row['at']}: the {'text' if 'text' in row else 'prompt'} gives no tokens")
        if names == ("completions",) and max(map(len, responses)) >= args.max_length:
            kept = [index for index, ids in enumerate(responses) if len(ids) < args.max_length]
            row = rankings.keep(row, kept)
            responses = [responses[index] for index in kept] if len(set(row["ranks"])) > 1 else responses
        room = args.max_length - max(map(len, responses))
        if room < 1:
            dropped += 1
            continue
        fitted = data.fit_prompt(tokenizer, prompt, room, args.long_prompts, f"{row['at']}: ")
        cut += len(fitted) < len(prompt)
        encoded.append({"prompt": fitted, "responses": responses, "row": row})
    limit = f"max_length {args.max_length}"
    if cut:
        logger.warning("cut the left end of %d of %d %s prompts to fit into %s", cut, len(rows), what, limit)
    if dropped:
        logger.warning("dropped %d of %d %s rows: a completion alone fills %s", dropped, len(rows), what, limit)
    if rows and not encoded:
        raise ValueError(f"max_length: got {args.max_length}, too short for every completion of the {what} rows")
    return encoded


def _encode_row(tokenizer, row, names):
    if "text" in row:
        ids = data.encode_text(tokenizer, row["text"])
        return (ids[:1], [ids[1:]]) if len(ids) > 1 else ([], [[]])  # the end alone
    texts = row["completions"] if names == ("completions",) else [row[name] for name in names]
    return data.encode_prompt(tokenizer, row["prompt"], row["at"]), [
        data.encode_completion(tokenizer, text) for text in texts
    ]


def make_batch(examples, pad_id, *, packed, hidden_size=768):
    """One forward pass over examples of `encode_rows`.

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
        fields = rows._asdict()
        layout = fields.pop("layout")
        return {**fields, "attention_mask": layout if rows.two_part_is_faster(hidden_size) else rows.attention_mask}
    return _padded(prompts, responses, pad_id)


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
