"""K responses to a prompt in one forward: the prompt is computed once, and several prompts share a row."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from . import _packing_attention
from ._checks import check_dtype, check_in, check_range, check_same_device, check_shape, check_tensor
from .reference import packing as _layout


class _Fields(NamedTuple):
    input_ids: Tensor  # [B, L] int64
    position_ids: Tensor  # [B, L] int64, restarting at the prompt's end for each response
    layout: Tensor  # [B, 1, 2, L] int64: each token's prompt (-1 = padding), and 0 in the prompt, k + 1 in response k
    label_rows: Tensor  # [N] int64, the row that predicts each response token
    labels: Tensor  # [N] int64, the response tokens
    last_token_rows: Tensor  # [S] int64, the last token of each response (of the prompt, if the response is empty)
    cu_groups: Tensor  # [P+1] int64, prompt p owns the responses cu_groups[p] .. cu_groups[p+1]-1
    cu_responses: Tensor  # [S+1] int64, response s owns the labels cu_responses[s] .. cu_responses[s+1]-1


class PackedResponses(_Fields):
    """What the model takes, and where to read its output; B rows of L tokens, P prompts, S responses, N labels.

    Row numbers count the model's output flattened to [B * L, ...]. Responses keep the order in which they were given.
    Numbers of tokens are Python ints, for which a GPU is waited for.
    """

    def to(self, device) -> "PackedResponses":
        """The same on another device."""
        return PackedResponses(*(field.to(device) for field in self))

    @property
    def blocks(self) -> Tensor:
        """[B, L] int64: the number of each token's prompt, -1 = padding."""
        return self.layout[:, 0, 0]

    @property
    def segments(self) -> Tensor:
        """[B, L] int64: 0 in a prompt, k + 1 in its response k."""
        return self.layout[:, 0, 1]

    @cached_property
    def attention_mask(self) -> Tensor:
        """[B, 1, L, L] bool, 1 = sees. Made when it is first asked for, and kept."""
        return _layout.shared_prefix_mask(self.blocks, self.segments)

    def block_mask(self, **options):
        """The same mask as a BlockMask of FlexAttention; options are those of `create_block_mask`, as BLOCK_SIZE."""
        return block_mask(self.layout, **options)

    @property
    def tokens(self) -> int:
        """Tokens of the prompts and responses; the model computes `input_ids.numel()`, padding included."""
        return int((self.blocks != _layout.PADDING).sum())

    @property
    def separate_tokens(self) -> int:
        """Tokens of a row of its own for each response, prompt and response, without padding."""
        prompts = self.blocks[(self.blocks != _layout.PADDING) & (self.segments == 0)]
        lengths = torch.bincount(prompts, minlength=len(self.cu_groups) - 1)
        return int((lengths * self.cu_groups.diff()).sum()) + len(self.labels)

    @property
    def padding_fraction(self) -> float:
        """Share of padding among the tokens that the model computes."""
        return 1 - self.tokens / max(self.input_ids.numel(), 1)

    def two_part_is_faster(self, hidden_size: int = 768) -> bool:
        """Whether a CPU takes less time for `layout` than for `attention_mask` in a model of width `hidden_size`."""
        return _packing_attention.two_part_is_faster(self.layout, hidden_size)

    @property
    def token_rows(self) -> Tensor:
        """[N] int64: the row of each response token itself, where `label_rows` is the one before it."""
        rows = self.label_rows.roll(-1)
        ends, sizes = self.cu_responses[1:], self.cu_responses.diff()
        rows[ends[sizes > 0] - 1] = self.last_token_rows[sizes > 0]
        return rows

    def split(self, values: Tensor) -> list[Tensor]:
        """The model's output [B, L, ...] at each response's own tokens: S tensors [R_s, ...]. Differentiable."""
        check_tensor("values", values)
        shape = (*self.input_ids.shape, *values.shape[2:])
        check_shape("values", values, shape, "[B, L, ...], one for each token")
        return list(values.flatten(0, 1)[self.token_rows].split(self.cu_responses.diff().tolist()))

    def per_response(self, values: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """Spread values [N, ...] of the labels, for instance log-probs, over [S, T, ...] and the mask [S, T] bool.

        T is the longest response; `fill` stands under mask 0. Differentiable in values; waits for the device once.
        """
        check_tensor("values", values)
        check_shape("values", values, (self.labels.shape[0], *values.shape[1:]), "[N, ...], one for each label")
        return _spread(values, self.cu_responses, fill)

    def per_prompt(self, scores: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """Spread scores [S, ...] of the responses over [P, K, ...] and the mask [P, K] bool.

        K is the largest group; `fill` stands under mask 0. Differentiable in scores; waits for the device once.
        """
        check_tensor("scores", scores)
        wanted = (self.last_token_rows.shape[0], *scores.shape[1:])
        check_shape("scores", scores, wanted, "[S, ...], one for each response")
        return _spread(scores, self.cu_groups, fill)


def block_mask(layout: Tensor, **options):
    """`PackedResponses.block_mask` from the layout [B, 1, 2, L] alone."""
    from torch.nn.attention.flex_attention import create_block_mask

    blocks, segments = layout[:, 0, 0], layout[:, 0, 1]

    def sees(b, h, query, key):
        own = (segments[b, key] == 0) | (segments[b, key] == segments[b, query])
        same_block = (blocks[b, query] == blocks[b, key]) & (blocks[b, query] != _layout.PADDING)
        return (same_block & own & (query >= key)) | (query == key)

    rows, length = blocks.shape
    return create_block_mask(sees, rows, None, length, length, device=layout.device, **options)


def _spread(values, cu_seqlens, fill):
    sizes = cu_seqlens.diff()
    longest = int(sizes.max()) if sizes.numel() else 0
    step = torch.arange(longest, dtype=torch.int64, device=sizes.device)
    mask = step < sizes[:, None]
    index = torch.where(mask, cu_seqlens[:-1, None] + step, 0)
    spread = values[index] if values.shape[0] else values.new_zeros((*mask.shape, *values.shape[1:]))
    return torch.where(mask.reshape(*mask.shape, *[1] * (values.dim() - 1)), spread, fill), mask


def pack_responses(prompts, responses, *, max_tokens=None, pad_token_id=0, device=None):
    """Lay out [prompt | response_1 | ... | response_K] so that one forward gives what K separate rows would.

    A response sees its prompt and itself, and its positions go on from the prompt's end; so a prompt of P tokens with K
    responses of R costs P + K * R tokens instead of K * (P + R). Several prompts share a row up to `max_tokens`: the
    longest block first, each into the first row with room. Padding at a row's end sees itself only.

    Pass all three of input_ids, position_ids and attention_mask to the model. With attention_mask=None transformers
    guesses the segments from the positions, and guesses wrong for this layout without saying so. The mask is boolean,
    for attn_implementation="sdpa"; `rlhf_kernels.integrations.transformers.packed_inputs(model, packed)` gives each
    implementation what it takes, and "rlhf_shared_prefix" among them needs no mask of L^2 entries at all.

    Args:
        prompts: P sequences of token ids (lists or 1-D tensors), none of them empty.
        responses: P groups, each of at least one sequence of token ids; a response may be empty (it has no labels).
        max_tokens: budget of a row; None = the longest block. The dense mask, if it is made, has B * L^2 entries.
        pad_token_id: what fills the rest of a row; it may also occur as a real token.
        device: where the tensors go; None = CPU.
    Returns:
        PackedResponses(input_ids, position_ids, layout, label_rows, labels, last_token_rows, cu_groups, cu_responses)
        with attention_mask [B, 1, L, L] bool, made when it is asked for. `linear_logprobs(hidden.flatten(0, 1), weight,
        labels, rows=label_rows)` gives the log-probs [N], `.per_response(log_probs)` spreads them over [S, T],
        `scores.flatten()[last_token_rows]` are the reward model's scores [S] for `bradley_terry_loss(scores, ranks,
        cu_groups)`.
    Raises:
        ValueError: another number of groups than prompts; an empty prompt or group; ids that are not integers
            >= 0; a block longer than max_tokens.
    Cost:
        Linear in the tokens, on the host. The mask, B * L^2 bytes, is made on `device`.
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
    return PackedResponses(**{name: field.to(device) for name, field in fields.items()})


def shared_prefix_attention(query, key, value, layout, *, scale=None, form="auto"):
    """softmax(scale * query key^T) value, in which a response sees its prompt and itself, up to each token.

    Two parts without a mask: what a response sees of its prompt, and what of itself, merged by their log-sum-exps. A
    prompt of P tokens with K responses of R costs P^2 / 2 + K R P + K R^2 / 2 pairs of a query and a key, against the
    (P + K R)^2 of a dense mask, which is not made. Padding sees itself only.

    Args:
        query: [B, H, L, D] fp32|bf16|fp16|fp64.
        key: [B, G, L, D], like query; H must be a multiple of G, and head g serves the H / G query heads from g H / G.
        value: [B, G, L, D], like key.
        layout: [B, 1, 2, L] int64, as `pack_responses` gives it.
        scale: > 0, factor of the scores; None = 1 / sqrt(D).
        form: "two_part"; "dense", which is SDPA with the mask; or "auto": two parts where PyTorch has the kernel for
            them (CPU tensors, heads of query and value of one size), else dense.
    Returns:
        [B, H, L, D] in query's dtype. Differentiable once in query, key and value.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit; scale <= 0; a layout in which responses stand without
            their prompt; form="two_part" where its kernel is not to be had.
    Cost:
        Memory of a few tensors like query; reads the layout on the host, for which a GPU is waited for.
    Example:
        >>> packed = pack_responses([[5, 6]], [[[7, 8], [9]]])
        >>> query, key, value = torch.randn(3, 1, 2, 5, 4).unbind()
        >>> out = shared_prefix_attention(query, key, value, packed.layout)
        >>> alone = [0, 1, 4]  # the prompt and its second response
        >>> torch.allclose(out[:, :, 4], torch.nn.functional.scaled_dot_product_attention(
        ...     query[:, :, [4]], key[:, :, alone], value[:, :, alone])[:, :, 0], atol=1e-6)
        True
    """
    check_dtype("query", query)
    check_shape("query", query, (None, None, None, None), "[B, H, L, D]")
    (batch, heads, length, size), groups = query.shape, key.shape[1] if key.dim() == 4 else None
    check_shape("key", key, (batch, groups, length, size), "[B, G, L, D]")
    check_shape("value", value, (batch, groups, length, None), "[B, G, L, D]")
    check_shape("layout", layout, (batch, 1, 2, length), "[B, 1, 2, L], from pack_responses")
    check_dtype("layout", layout, torch.int64)
    check_same_device(query=query, key=key, value=value, layout=layout)
    check_in("form", form, ("auto", "two_part", "dense"))
    if not groups or heads % groups:
        raise ValueError(f"key has {groups} heads, expected a divisor of the {heads} heads of query")
    if scale is not None:
        check_range("scale", scale, 0, low_open=True)
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    check_dtype("key", key, query.dtype)
    check_dtype("value", value, query.dtype)
    reason = _packing_attention.why_not_two_part(query, value)
    if form == "two_part" and reason:
        raise ValueError(f"form is 'two_part', but {reason}; use 'auto' or 'dense'")
    if form == "dense" or reason:
        return _layout.attention(query, key, value, layout, scale)
    return _packing_attention.two_part_attention(query, key, value, layout, scale)


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
