"""pack_responses and shared_prefix_attention: layout, values, gradients; models are in test_packing_models.py."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_kernels import PackedResponses, pack_responses, shared_prefix_attention
from rlhf_kernels.reference import packing as reference


def tree_paths(prompt, group):
    """Which earlier tokens each token of a block may see, from the definition of the layout: (index, path)."""
    paths = [(i, list(range(i + 1))) for i in range(len(prompt))]
    start = len(prompt)
    for response in group:
        own = list(range(start, start + len(response)))
        paths += [(token, list(range(len(prompt))) + own[: n + 1]) for n, token in enumerate(own)]
        start += len(response)
    return paths


@pytest.mark.parametrize("case", reference.CASES)
def test_values(case):
    """Every field against what the definition says, found by walking over the tokens of each block."""
    inputs = reference.example_inputs(case)
    prompts, responses = inputs["prompts"], inputs["responses"]
    packed = pack_responses(prompts, responses, max_tokens=inputs["max_tokens"], pad_token_id=0)
    rows, length = packed.input_ids.shape
    if inputs["max_tokens"] is not None:
        assert length <= inputs["max_tokens"] and rows < len(prompts)
    flat_ids, flat_positions = packed.input_ids.flatten(), packed.position_ids.flatten()
    mask = packed.attention_mask[:, 0]
    expected = torch.eye(length, dtype=torch.bool).repeat(rows, 1, 1)
    s = 0
    used = torch.zeros(rows * length, dtype=torch.bool)
    for p, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        assert packed.cu_groups[p].item() == s
        block = [*prompt, *(token for response in group for token in response)]
        # the first label of the prompt's first non-empty response is predicted by the prompt's last token
        first_label = packed.cu_responses[s].item()
        prompt_end = packed.label_rows[first_label].item()
        row, start = divmod(prompt_end - len(prompt) + 1, length)
        here = slice(row * length + start, row * length + start + len(block))
        assert flat_ids[here].tolist() == block and not used[here].any()
        used[here] = True
        for token, path in tree_paths(prompt, group):
            expected[row, start + token, [start + other for other in path]] = True
            assert flat_positions[row * length + start + token].item() == len(path) - 1
        offset = len(prompt)
        for response in group:
            own = slice(packed.cu_responses[s].item(), packed.cu_responses[s + 1].item())
            assert packed.labels[own].tolist() == response
            tokens = [prompt_end, *range(here.start + offset, here.start + offset + len(response))]
            assert packed.label_rows[own].tolist() == tokens[:-1]
            assert packed.last_token_rows[s].item() == tokens[-1]
            offset, s = offset + len(response), s + 1
    assert torch.equal(mask, expected)
    assert packed.cu_groups[-1].item() == s and flat_ids[~used].eq(0).all() and flat_positions[~used].eq(0).all()


def random_heads(layout, heads, groups, dtype, seed=0):
    """query, key and value [B, heads or groups, L, 8], transposed as models have them, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    rows, _, _, length = layout.shape
    shapes = [(rows, length, n, 8) for n in (heads, groups, groups, heads)]
    *inputs, upstream = (torch.randn(s, generator=generator, dtype=dtype).transpose(1, 2) for s in shapes)
    return [x.requires_grad_() for x in inputs], upstream


def attention_by_paths(query, key, value, packed, scale=None):
    """Each token's softmax over the tokens of its path, one by one; padding gives its value."""
    (rows, _, length, size), repeats = query.shape, query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    out = []
    for row in range(rows):
        for token in range(length):
            ids, own = packed.segments[row], packed.segments[row, token]
            path = [
                other
                for other in range(token + 1)
                if packed.blocks[row, other] == packed.blocks[row, token] != -1 and ids[other] in (0, own)
            ] or [token]
            scores = torch.einsum("hd,hnd->hn", query[row, :, token], key[row][:, path])
            weights = torch.softmax(scores * (size**-0.5 if scale is None else scale), -1)
            out.append(torch.einsum("hn,hnd->hd", weights, value[row][:, path]))
    return torch.stack(out).unflatten(0, (rows, length)).transpose(1, 2) if out else torch.zeros_like(query)


def with_gradients(out, inputs, upstream):
    return out, *torch.autograd.grad(out, inputs, upstream)


def term_sizes(inputs, upstream, scale):
    """The largest terms of the output and the gradients of query, key and value. They may cancel: where one weight is
    nearly 1, d query = scale * sum of p * (dp - sum of p * dp) * key is as good as 0, but dp was rounded before."""
    query, key, value, upstream = (x.detach().double().norm(dim=-1).max().item() for x in (*inputs, upstream))
    scores = upstream * value * (8**-0.5 if scale is None else scale)
    return value, scores * key, scores * query, upstream


@pytest.mark.parametrize("form", ["two_part", "dense"])
@pytest.mark.parametrize("case", reference.CASES)
@pytest.mark.parametrize(("heads", "groups", "scale"), [(2, 2, None), (6, 2, 0.3), (3, 1, 1.0)])
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float64, marks=pytest.mark.slow), torch.float32, torch.bfloat16,
     pytest.param(torch.float16, marks=pytest.mark.slow)],
)  # fmt: skip
def test_gradients_attention(case, form, heads, groups, scale, dtype):
    """Output and gradients of both forms against the definition in float64, token by token."""
    inputs = reference.example_inputs(case)
    packed = pack_responses(inputs["prompts"], inputs["responses"], max_tokens=inputs["max_tokens"])
    tensors, upstream = random_heads(packed.layout, heads, groups, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    found = shared_prefix_attention(*tensors, packed.layout, scale=scale, form=form)
    assert found.dtype == dtype and found.shape == tensors[0].shape
    found = with_gradients(found, tensors, upstream)
    expected = attention_by_paths(*exact, packed, scale)
    if not inputs["prompts"]:
        assert all(x.numel() == 0 for x in found)
        return
    exactly = with_gradients(expected, exact, upstream.double())
    roundings = (2 if dtype.itemsize == 2 else 8) * torch.finfo(dtype).eps
    for actual, wanted, size in zip(found, exactly, term_sizes(exact, upstream, scale), strict=True):
        assert (actual.double() - wanted).abs().max() <= roundings * max(size, wanted.abs().max())


def test_gradients_gradcheck():
    """First derivatives by finite differences; the second is refused."""
    packed = pack_responses([[1, 2], [3]], [[[4, 5], [6], [7, 8]], [[9]]], max_tokens=12)
    inputs, _ = random_heads(packed.layout, 2, 1, torch.float64)
    assert packed.padding_fraction == 0 and torch.autograd.gradcheck(
        lambda *x: shared_prefix_attention(*x, packed.layout, form="two_part"), inputs
    )
    out = shared_prefix_attention(*inputs, packed.layout, form="two_part").square().sum()
    (gradient,) = torch.autograd.grad(out, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


class Largest(TorchDispatchMode):
    """The most entries that a tensor has which an operator returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


def test_memory_without_a_mask():
    """Packing and the two parts make nothing of L^2 entries, forward and backward; the dense form does."""
    prompt, responses = [1] * 300, [[2] * 250] * 4
    length = 300 + 4 * 250
    largest = {}
    for form in ("two_part", "dense"):
        with Largest() as largest[form]:
            packed = pack_responses([prompt], [responses])
            inputs, upstream = random_heads(packed.layout, 2, 1, torch.float32)
            shared_prefix_attention(*inputs, packed.layout, form=form).backward(upstream)
    assert largest["two_part"].entries < 20 * length < length**2 <= largest["dense"].entries


def test_masked_garbage():
    """NaN at padding reaches no other token, and the gradient there is that of a token that sees itself."""
    packed = pack_responses([[1, 2], [3]], [[[4, 5], [6], [7, 8]], [[9]]])
    (query, key, value), upstream = random_heads(packed.layout, 2, 1, torch.float32)
    real = (packed.blocks >= 0)[:, None, :, None]
    assert 0 < real.sum() < real.numel()
    clean = with_gradients(
        shared_prefix_attention(query, key, value, packed.layout), (query, key, value), torch.where(real, upstream, 0)
    )
    dirty = [torch.where(real, x, torch.nan).detach().requires_grad_() for x in (query, key, value)]
    out = shared_prefix_attention(*dirty, packed.layout)
    found = with_gradients(out, dirty, torch.where(real, upstream, 0))
    for actual, wanted in zip(found, clean, strict=True):
        assert torch.equal(torch.where(real, actual, 0), torch.where(real, wanted, 0))


def test_gradients_per_response():
    """per_response spreads values over [S, T]; the gradient comes back to each label once."""
    packed = pack_responses([[5, 6], [7]], [[[8, 2], [], [9, 10, 2]], [[2]]])
    values = torch.arange(1.0, 7.0, requires_grad=True)
    spread, mask = packed.per_response(values)
    assert spread.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5], [6, 0, 0]] and mask.sum(1).tolist() == [2, 0, 3, 1]
    (spread * torch.tensor([[1.0], [2], [3], [4]])).sum().backward()
    assert values.grad.tolist() == [1, 1, 3, 3, 3, 4]
    hidden, _ = packed.per_response(values.detach()[:, None].expand(6, 5), fill=-1.0)
    assert hidden.shape == (4, 3, 5) and hidden[0, 2].eq(-1).all()
    nan, mask = packed.per_response(torch.full((6,), torch.nan))
    assert nan[~mask].eq(0).all()


def test_reference_counts():
    """By hand: blocks of 2 + 2 + 1 + 0 and 3 + 1 tokens in rows of 5."""
    packed = pack_responses([[1, 2], [3, 4, 5]], [[[6, 7], [8], []], [[9]]], max_tokens=5)
    assert packed.layout.tolist() == [[[[0, 0, 0, 0, 0], [0, 0, 1, 1, 2]]], [[[1, 1, 1, 1, -1], [0, 0, 0, 1, 0]]]]
    assert packed.blocks.tolist() == [[0] * 5, [1, 1, 1, 1, -1]] and packed.segments[0].tolist() == [0, 0, 1, 1, 2]
    assert (packed.tokens, packed.input_ids.numel(), packed.separate_tokens) == (9, 10, 4 + 3 + 2 + 4)
    assert packed.padding_fraction == pytest.approx(0.1)
    assert packed.token_rows.tolist() == [2, 3, 4, 8]
    split = packed.split(packed.input_ids)
    assert [x.tolist() for x in split] == [[6, 7], [8], [], [9]]
    wide = torch.randn(2, 5, 3, requires_grad=True)
    pieces = packed.split(wide)
    assert [tuple(x.shape) for x in pieces] == [(2, 3), (1, 3), (0, 3), (1, 3)]
    torch.cat(pieces).sum().backward()
    assert wide.grad.sum(-1).flatten().tolist() == [0, 0, 3, 3, 3, 0, 0, 0, 3, 0]
    scores, mask = packed.per_prompt(torch.tensor([0.5, 1.5, 2.5, 3.5]), fill=-1.0)
    assert scores.tolist() == [[0.5, 1.5, 2.5], [3.5, -1, -1]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("case", [case for case in reference.CASES if case != "empty"])
def test_values_block_mask(case):
    """FlexAttention's BlockMask says entry by entry what attention_mask says, and gives what two parts give."""
    inputs = reference.example_inputs(case)
    packed = pack_responses(inputs["prompts"], inputs["responses"], max_tokens=inputs["max_tokens"])
    rows, length = packed.input_ids.shape
    blocks = packed.block_mask(BLOCK_SIZE=16)
    assert blocks.BLOCK_SIZE == (16, 16)
    assert torch.equal(create_mask(blocks.mask_mod, rows, 1, length, length, device="cpu"), packed.attention_mask)
    query, key, value = (x.detach() for x in random_heads(packed.layout, 4, 2, torch.float64)[0])
    with torch.no_grad():
        found = flex_attention(query, key, value, block_mask=packed.block_mask(), enable_gqa=True)
        wanted = shared_prefix_attention(query, key, value, packed.layout, form="two_part")
    real = (packed.blocks >= 0)[:, None, :, None]
    torch.testing.assert_close(torch.where(real, found, 0), torch.where(real, wanted, 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_values_random_layouts(seed):
    """Both forms agree, gradients too, whatever the lengths, the groups and the rows."""
    generator = torch.Generator().manual_seed(seed)

    def size(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    prompts = [[1] * size(1, 30) for _ in range(size(1, 6))]
    responses = [[[2] * size(0, 30) for _ in range(size(1, 6))] for _ in prompts]
    packed = pack_responses(prompts, responses, max_tokens=size(200, 400))
    inputs, upstream = random_heads(packed.layout, 4, 2, torch.float64, seed)
    two, dense = (
        with_gradients(shared_prefix_attention(*inputs, packed.layout, form=form), inputs, upstream)
        for form in ("two_part", "dense")
    )
    for actual, wanted in zip(two, dense, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_values_choice_of_form():
    """Long rows are faster in two parts, short ones under a dense mask; a narrow model needs longer ones."""
    long, short = pack_responses([[1] * 512], [[[2] * 64] * 9]), pack_responses([[1] * 16], [[[2] * 8] * 9])
    assert long.two_part_is_faster() and not short.two_part_is_faster()
    middle = pack_responses([[1] * 64], [[[2] * 32] * 9])
    assert middle.two_part_is_faster(hidden_size=768) and not middle.two_part_is_faster(hidden_size=32)


def test_edges():
    """No prompt; one token each; tensors as input; an empty response reads the prompt's last token; devices."""
    nothing = pack_responses([], [])
    assert nothing.input_ids.shape == (0, 0) and nothing.attention_mask.shape == (0, 1, 0, 0)
    assert nothing.cu_groups.tolist() == [0] and nothing.per_response(torch.zeros(0))[0].shape == (0, 0)
    single = pack_responses([torch.tensor([3])], [[torch.tensor([4])]])
    assert single.input_ids.tolist() == [[3, 4]] and single.label_rows.tolist() == [0]
    empty = pack_responses([[3, 4]], [[[], [5]]])
    assert empty.last_token_rows.tolist() == [1, 2] and empty.labels.tolist() == [5]
    only_empty = pack_responses([[3]], [[[]]])
    assert only_empty.labels.shape == (0,) and only_empty.per_response(torch.zeros(0))[0].shape == (1, 0)
    meta = single.to("meta")
    assert isinstance(meta, PackedResponses) and all(field.device.type == "meta" for field in meta)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1]], []), "responses has 0 groups, expected 1"),
        (([[]], [[[1]]]), r"prompts\[0\] is empty"),
        (([[1]], [[]]), r"responses\[0\] is empty, expected at least one response"),
        (([[1]], [[2, 3]]), r"responses\[0\]\[0\] must be a sequence, got int"),
        ((["ab"], [[[1]]]), r"prompts\[0\] must be a sequence, got str"),
        (([[1.5]], [[[1]]]), r"prompts\[0\] must hold integer token ids, got 1.5"),
        (([[1]], [[[-100]]]), r"responses\[0\]\[0\] holds -100, expected token ids >= 0"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_responses(*arguments)


def test_bad_input_budget():
    message = r"max_tokens is 5, but prompts\[1\] and its 2 responses have 6 tokens; raise max_tokens"
    with pytest.raises(ValueError, match=message):
        pack_responses([[1], [1, 2]], [[[3]], [[3, 4], [5, 6]]], max_tokens=5)
    packed = pack_responses([[1]], [[[2], [3]]])
    with pytest.raises(ValueError, match=r"values has shape \[3\], expected \[2\]"):
        packed.per_response(torch.zeros(3))
    with pytest.raises(ValueError, match=r"scores has shape \[3\], expected \[2\]"):
        packed.per_prompt(torch.zeros(3))
    with pytest.raises(ValueError, match=r"values has shape \[3, 1\], expected \[1, 3\]"):
        packed.split(torch.zeros(3, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(1, 2, 3)}, r"query has shape \[1, 2, 3\], expected \[\*, \*, \*, \*\]"),
        ({"query": torch.zeros(1, 2, 3, 8).long()}, "query has dtype int64"),
        ({"key": torch.zeros(1, 2, 4, 8)}, r"key has shape \[1, 2, 4, 8\], expected \[1, 2, 3, 8\]"),
        ({"key": torch.zeros(1, 2, 3, 8).double()}, "key has dtype float64, expected one of: float32"),
        ({"value": torch.zeros(1, 1, 3, 8)}, r"value has shape \[1, 1, 3, 8\], expected \[1, 2, 3, \*\]"),
        (
            {"key": torch.zeros(1, 3, 3, 8), "value": torch.zeros(1, 3, 3, 8)},
            "key has 3 heads, expected a divisor of the 2",
        ),
        ({"layout": torch.ones(1, 1, 3, 3).bool()}, r"layout has shape \[1, 1, 3, 3\], expected \[1, 1, 2, 3\]"),
        ({"layout": torch.zeros(1, 1, 2, 3)}, "layout has dtype float32, expected one of: int64"),
        (
            {"layout": torch.tensor([[[[0, 0, 0], [1, 1, 2]]]])},
            "in row 0 the responses of block 0 stand without their prompt",
        ),
        ({"form": "flash"}, "form must be one of 'auto', 'two_part', 'dense', got 'flash'"),
        (
            {"value": torch.zeros(1, 2, 3, 4), "form": "two_part"},
            r"but the heads .* differ in size \(8 and 4\)",
        ),
    ],
)
def test_bad_input_attention(changes, message):
    arguments = {name: torch.zeros(1, 2, 3, 8) for name in ("query", "key", "value")}
    arguments |= {"layout": pack_responses([[1]], [[[2], [3]]]).layout, **changes}
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(**arguments)


def test_bad_input_other_devices():
    """Where PyTorch has no kernel for a part the dense mask serves, and an explicit wish for two parts raises."""
    packed = pack_responses([[1]], [[[2], [3]]])
    tensors = [torch.zeros(1, 2, 3, 8, device="meta")] * 3
    with pytest.raises(ValueError, match="form is 'two_part', but the tensors are on meta"):
        shared_prefix_attention(*tensors, packed.layout.to("meta"), form="two_part")
    assert shared_prefix_attention(*tensors, packed.layout.to("meta")).shape == (1, 2, 3, 8)
    unequal = shared_prefix_attention(
        *(x.to("cpu") for x in torch.zeros(2, 1, 2, 3, 8)), torch.zeros(1, 2, 3, 4), packed.layout
    )
    assert unequal.shape == (1, 2, 3, 4)
    with pytest.raises(ValueError, match="layout is on cpu, expected meta, where query is"):
        shared_prefix_attention(*tensors, packed.layout)


def test_contract():
    """Deterministic, never over the budget, few rows; indices stay on the rows they were given."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 12, (30, 2), generator=generator).tolist()
    prompts = [[1] * prompt for prompt, _ in sizes]
    responses = [[[2] * response] * 2 for _, response in sizes]
    packed = pack_responses(prompts, responses, max_tokens=40)
    again = pack_responses(prompts, responses, max_tokens=40)
    assert all(torch.equal(a, b) for a, b in zip(packed, again, strict=True))
    tokens = sum(map(len, prompts)) + sum(len(response) for group in responses for response in group)
    assert packed.input_ids.shape[1] <= 40 and (packed.input_ids != 0).sum().item() == tokens
    assert len(packed.input_ids) <= 1.25 * tokens / 40 + 1
    assert packed.labels.eq(2).all() and packed.input_ids.flatten()[packed.last_token_rows].eq(2).all()


def test_contract_attention():
    """Same bits run to run, and a block's bits do not depend on what else lies in its row."""
    prompts, responses = [[1] * 40, [2] * 9], [[[3] * 20] * 3, [[4] * 5] * 2]
    both, alone = pack_responses(prompts, responses, max_tokens=200), pack_responses(prompts[:1], responses[:1])
    length = alone.input_ids.shape[1]
    inputs, upstream = random_heads(both.layout, 4, 2, torch.float32)
    runs = [
        with_gradients(shared_prefix_attention(*inputs, both.layout, form="two_part"), inputs, upstream)
        for _ in range(2)
    ]
    own = [x[:, :, :length].detach().requires_grad_() for x in inputs]
    single = shared_prefix_attention(*own, alone.layout, form="two_part")
    single = with_gradients(single, own, upstream[:, :, :length])
    for first, second, apart in zip(*runs, single, strict=True):
        assert torch.equal(first, second) and torch.equal(first[:, :, :length], apart)


def test_contract_strides():
    """Tensors whose last dimension is not contiguous, as the kernel would misread them, and expanded gradients."""
    packed = pack_responses([[1, 2]], [[[3, 4], [5]]])
    inputs, _ = random_heads(packed.layout, 2, 2, torch.float64)
    turned = [x.detach().mT.contiguous().mT.requires_grad_() for x in inputs]
    assert turned[0].stride(-1) != 1
    found, wanted = (shared_prefix_attention(*x, packed.layout, form="two_part") for x in (turned, inputs))
    for actual, expected in zip(
        with_gradients(found.sum(), turned, None), with_gradients(wanted.sum(), inputs, None), strict=True
    ):
        assert torch.equal(actual, expected)


def test_contract_compiled():
    """A compiled program goes around the parts, which are read on the host: same bits, and compiled once only."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    def program(query, key, value):
        return shared_prefix_attention(query * 2, key, value, packed.layout).sum(1)

    packed = pack_responses([[1, 2]], [[[3, 4], [5]]])
    inputs, _ = random_heads(packed.layout, 2, 2, torch.float32)
    expected = with_gradients(program(*inputs).square().sum(), inputs, None)
    compiled = torch.compile(program, backend=counting)
    counts = []
    for _ in range(3):
        found = with_gradients(compiled(*inputs).square().sum(), inputs, None)
        assert all(map(torch.equal, found, expected))
        counts.append(len(graphs))
    assert 0 < counts[0] == counts[1] == counts[2]
