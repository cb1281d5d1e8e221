"""K responses behind one copy of their prompt: the layout in plain PyTorch.

A row holds blocks `[prompt | response_1 | ... | response_K]`, one for each prompt that was placed in it, then padding.
Segment ids say which token belongs where; the mask, the positions and all indices follow from them.
"""

import torch
from torch import Tensor

CASES = ("one", "k4", "ragged", "shared_rows", "empty_response", "empty")
PADDING = -1


def place_blocks(lengths: list[int], max_tokens: int) -> tuple[list[tuple[int, int]], int]:
    """(row, first token) of each block and the number of rows: longest first, each into the first row with room."""
    used: list[int] = []
    places: list[tuple[int, int]] = [(0, 0)] * len(lengths)
    for block in sorted(range(len(lengths)), key=lambda block: -lengths[block]):
        row = next((row for row, tokens in enumerate(used) if tokens + lengths[block] <= max_tokens), len(used))
        if row == len(used):
            used.append(0)
        places[block] = (row, used[row])
        used[row] += lengths[block]
    return places, len(used)


def shared_prefix_mask(blocks: Tensor, segments: Tensor) -> Tensor:
    """[B, 1, L, L] bool: a token sees its own segment and its block's prompt, up to itself; padding sees itself.

    blocks [B, L] is the prompt's number, PADDING outside; segments [B, L] is 0 in the prompt and k + 1 in response k.
    """
    length = blocks.shape[1]
    step = torch.arange(length, dtype=torch.int64, device=blocks.device)
    earlier = step[:, None] >= step[None, :]
    same_block = blocks[:, :, None] == blocks[:, None, :]
    visible = (segments[:, None, :] == 0) | (segments[:, :, None] == segments[:, None, :])
    padding = (blocks == PADDING)[:, :, None]
    seen = (same_block & visible & earlier & ~padding) | torch.eye(length, dtype=torch.bool, device=blocks.device)
    return seen[:, None]


def attention(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float | None = None) -> Tensor:
    """[B, H, L, D]: softmax(scale * query key^T) value under the mask of the layout [B, 1, 2, L], all L^2 pairs of it.

    key and value [B, G, L, D] have a head for each H / G heads of query.
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    mask = shared_prefix_mask(layout[:, 0, 0], layout[:, 0, 1])
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def pack(prompts: list[list[int]], responses: list[list[list[int]]], max_tokens: int, pad_token_id: int) -> dict:
    """The fields of PackedResponses, on the CPU."""
    sizes = [len(prompt) + sum(map(len, group)) for prompt, group in zip(prompts, responses, strict=True)]
    places, rows = place_blocks(sizes, max_tokens)
    length = max((start + size for (_, start), size in zip(places, sizes, strict=True)), default=0)
    integers = {"dtype": torch.int64, "device": "cpu"}
    input_ids, blocks = (torch.full((rows, length), fill, **integers) for fill in (pad_token_id, PADDING))
    position_ids, segments = (torch.zeros((rows, length), **integers) for _ in range(2))
    label_rows, labels, last_rows, cu_groups, cu_responses = [], [], [], [0], [0]
    for number, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        row, start = places[number]
        prompt_end = start + len(prompt)
        block_tokens, block_positions = list(prompt), list(range(len(prompt)))
        block_segments = [0] * len(prompt)
        for k, response in enumerate(group):
            first = start + len(block_tokens)
            previous = [prompt_end - 1, *range(first, first + len(response))]
            label_rows += [row * length + token for token in previous[: len(response)]]
            labels += response
            last_rows.append(row * length + previous[-1])
            cu_responses.append(len(labels))
            block_tokens += response
            block_positions += range(len(prompt), len(prompt) + len(response))
            block_segments += [k + 1] * len(response)
        cu_groups.append(len(last_rows))
        here = slice(start, start + sizes[number])
        input_ids[row, here] = torch.tensor(block_tokens, **integers)
        position_ids[row, here] = torch.tensor(block_positions, **integers)
        segments[row, here], blocks[row, here] = torch.tensor(block_segments, **integers), number
    fields = {"label_rows": label_rows, "labels": labels, "last_token_rows": last_rows}
    fields |= {"cu_groups": cu_groups, "cu_responses": cu_responses}
    fields = {name: torch.tensor(values, **integers) for name, values in fields.items()}
    layout = torch.stack([blocks, segments], 1)[:, None]
    return {"input_ids": input_ids, "position_ids": position_ids, "layout": layout, **fields}


def example_inputs(case: str, *, dtype: torch.dtype = torch.int64, device="cpu", seed: int = 0) -> dict:
    """prompts, responses and max_tokens of one named case; tokens are 1 .. 49."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(1, 50, (length,), generator=generator, dtype=torch.int64).tolist()

    shapes = {
        "one": [(3, [1])],
        "k4": [(5, [2, 4, 3, 1])],
        "empty_response": [(4, [3, 0, 2])],
        "empty": [],
    }.get(case, [(5, [2, 4, 3, 1]), (1, [6, 2]), (7, [3]), (2, [1, 1, 2])])
    return {
        "prompts": [tokens(prompt) for prompt, _ in shapes],
        "responses": [[tokens(size) for size in group] for _, group in shapes],
        "max_tokens": 24 if case == "shared_rows" else None,
    }
