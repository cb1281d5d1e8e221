"""K responses to a prompt in one forward: the prompt is computed once, and several prompts share a row."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_range, check_shape, check_tensor
from .reference import packing as _layout


class PackedResponses(NamedTuple):
    """What the model takes, and where to read its output; B rows of L tokens, P prompts, S responses, N labels.

    Row numbers count the model's output flattened to [B * L, ...]. Responses keep the order in which they were given.
    """

    input_ids: Tensor  # [B, L] int64
    position_ids: Tensor  # [B, L] int64, restarting at the prompt's end for each response
    attention_mask: Tensor  # [B, 1, L, L] bool, 1 = sees
    label_rows: Tensor  # [N] int64, the row that predicts each response token
    labels: Tensor  # [N] int64, the response tokens
    last_token_rows: Tensor  # [S] int64, the last token of each response (of the prompt, if the response is empty)
    cu_groups: Tensor  # [P+1] int64, prompt p owns the responses cu_groups[p] .. cu_groups[p+1]-1
    cu_responses: Tensor  # [S+1] int64, response s owns the labels cu_responses[s] .. cu_responses[s+1]-1

    def to(self, device) -> "PackedResponses":
        """The same on another device."""
        return PackedResponses(*(field.to(device) for field in self))

    def per_response(self, values: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """Spread values [N, ...] of the labels, for instance log-probs, over [S, T, ...] and the mask [S, T] bool.

        T is the longest response; `fill` stands under mask 0. Differentiable in values; waits for the device once.
        """
        check_tensor("values", values)
        check_shape("values", values, (self.labels.shape[0], *values.shape[1:]), "[N, ...], one for each label")
        sizes = self.cu_responses.diff()
        longest = int(sizes.max()) if sizes.numel() else 0
        step = torch.arange(longest, device=sizes.device)
        mask = step < sizes[:, None]
        index = torch.where(mask, self.cu_responses[:-1, None] + step, 0)
        spread = values[index] if values.shape[0] else values.new_zeros((*mask.shape, *values.shape[1:]))
        return torch.where(mask.reshape(*mask.shape, *[1] * (values.dim() - 1)), spread, fill), mask


def pack_responses(prompts, responses, *, max_tokens=None, pad_token_id=0, device=None):
    """Lay out [prompt | response_1 | ... | response_K] so that one forward gives what K separate rows would.

    A response sees its prompt and itself, and its positions go on from the prompt's end; so a prompt of P tokens with K
    responses of R costs P + K * R tokens instead of K * (P + R). Several prompts share a row up to `max_tokens`: the
    longest block first, each into the first row with room. Padding at a row's end sees itself only.

    Pass all three of input_ids, position_ids and attention_mask to the model. With attention_mask=None transformers
    guesses the segments from the positions, and guesses wrong for this layout without saying so. The mask is boolean,
    for attn_implementation="sdpa"; for "eager" pass torch.where(mask, 0.0, torch.finfo(dtype).min).

    Args:
        prompts: P sequences of token ids (lists or 1-D tensors), none of them empty.
        responses: P groups, each of at least one sequence of token ids; a response may be empty (it has no labels).
        max_tokens: budget of a row; None = the longest block. Attention memory grows with B * L^2.
        pad_token_id: what fills the rest of a row; it may also occur as a real token.
        device: where the tensors go; None = CPU.
    Returns:
        PackedResponses(input_ids, position_ids, attention_mask, label_rows, labels, last_token_rows, cu_groups,
        cu_responses). `linear_logprobs(hidden.flatten(0, 1), weight, labels, rows=label_rows)` gives the log-probs [N],
        `.per_response(log_probs)` spreads them over [S, T], `scores.flatten()[last_token_rows]` are the
        reward model's scores [S] for `bradley_terry_loss(scores, ranks, cu_groups)`.
    Raises:
        ValueError: another number of groups than prompts; an empty prompt or group; ids that are not integers
            >= 0; a block longer than max_tokens.
    Cost:
        Linear in the tokens on the host, and B * L^2 bytes for the mask, made on `device`.
    Example:
        >>> packed = pack_responses([[5, 6]], [[[7, 8], [9]]])
        >>> packed.input_ids.tolist(), packed.position_ids.tolist()
        ([[5, 6, 7, 8, 9]], [[0, 1, 2, 3, 2]])
        >>> packed.label_rows.tolist(), packed.labels.tolist(), packed.last_token_rows.tolist()
        ([1, 2, 1], [7, 8, 9], [3, 4])
        >>> packed.attention_mask[0, 0, 4].tolist()  # token 9 sees the prompt and itself
        [True, True, False, False, True]
    """
    prompts = [_ids(f"prompts[{p}]", prompt) for p, prompt in enumerate(prompts)]
    responses = [
        [_ids(f"responses[{p}][{k}]", response) for k, response in enumerate(_sequence(f"responses[{p}]", group))]
        for p, group in enumerate(responses)
    ]
    if len(prompts) != len(responses):
        raise ValueError(f"responses has {len(responses)} groups, expected {len(prompts)}, one for each prompt")
    check_range("pad_token_id", pad_token_id, 0)
    sizes = []
    for p, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        if not prompt:
            raise ValueError(f"prompts[{p}] is empty; its last token has to predict the first token of each response")
        if not group:
            raise ValueError(f"responses[{p}] is empty, expected at least one response to the prompt")
        sizes.append(len(prompt) + sum(map(len, group)))
    longest = max(sizes, default=0)
    if max_tokens is not None:
        check_range("max_tokens", max_tokens, 1)
        if longest > max_tokens:
            p = sizes.index(longest)
            raise ValueError(
                f"max_tokens is {max_tokens}, but prompts[{p}] and its {len(responses[p])} responses have {longest} "
                "tokens; raise max_tokens, shorten them, or give fewer responses"
            )
    fields = _layout.pack(prompts, responses, longest if max_tokens is None else max_tokens, pad_token_id)
    fields = {name: field.to(device) for name, field in fields.items()}
    mask = _layout.shared_prefix_mask(fields.pop("blocks"), fields.pop("segments"))
    return PackedResponses(attention_mask=mask, **fields)


def _sequence(name, value):
    if isinstance(value, Tensor):
        value = value.tolist() if value.dim() == 1 else list(value)
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ValueError(f"{name} must be a sequence, got {type(value).__name__}")
    return list(value)


def _ids(name, value):
    ids = _sequence(name, value)
    for token in ids:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise ValueError(f"{name} must hold integer token ids, got {token!r}")
        if token < 0:
            raise ValueError(f"{name} holds {int(token)}, expected token ids >= 0")
    return [int(token) for token in ids]
