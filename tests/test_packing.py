"""pack_responses: its layout, and traps 2 and 3 on tiny Llama and GPT-2 models."""

import pytest
import torch

from rlhf_kernels import PackedResponses, bradley_terry_loss, pack_responses
from rlhf_kernels.reference import packing as reference

VOCABULARY = 50


def tiny_model(family, seed=0, **options):
    """A two-layer causal LM or reward model; its weights are so large that every token in sight matters."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    options |= {"vocab_size": VOCABULARY, "attn_implementation": "sdpa", "initializer_range": 0.1}
    options |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **options,
        )
    else:
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **no_dropout, **options)
    if "num_labels" in options:
        return transformers.AutoModelForSequenceClassification.from_config(config)
    return transformers.AutoModelForCausalLM.from_config(config)


def forward(model, packed, **changes):
    fields = {name: getattr(packed, name) for name in ("input_ids", "position_ids", "attention_mask")}
    return model(**(fields | changes)).logits


def packed_log_probs(model, packed, **changes):
    """Log-probs [N] of the response tokens, read through label_rows."""
    rows = forward(model, packed, **changes).flatten(0, 1).log_softmax(-1)[packed.label_rows]
    return rows.gather(1, packed.labels[:, None])[:, 0]


def separate_log_probs(model, prompts, responses):
    """The same from one unpadded row for each response."""
    result = []
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            result.append(logits[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(result)


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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("max_tokens", [None, 24, 60])
def test_trap_03_shared_prefix_equals_separate_rows(family, max_tokens):
    """Log-probs as from one row for each response, to 1e-6 in fp32, and the same gradients."""
    model = tiny_model(family)
    inputs = reference.example_inputs("ragged")
    prompts, responses = inputs["prompts"], inputs["responses"]
    packed = pack_responses(prompts, responses, max_tokens=max_tokens)
    expected, actual = separate_log_probs(model, prompts, responses), packed_log_probs(model, packed)
    assert (actual - expected).abs().max() <= 1e-6
    weights = torch.linspace(-1, 1, len(expected))
    wanted = torch.autograd.grad(expected @ weights, list(model.parameters()), allow_unused=True)
    got = torch.autograd.grad(actual @ weights, list(model.parameters()), allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        assert a is None if b is None else torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trap_03_no_mask_is_wrong(family):
    """With attention_mask=None the segments are guessed from the positions: the log-probs differ."""
    model = tiny_model(family).eval()
    prompts, responses = [[5, 6, 7, 8]], [[[9, 10, 11], [12, 13], [14, 15]]]
    packed = pack_responses(prompts, responses)
    with torch.no_grad():
        expected = separate_log_probs(model, prompts, responses)
        naive = packed_log_probs(model, packed, attention_mask=None)
        good = packed_log_probs(model, packed)
    second = slice(packed.cu_responses[1], None)  # responses from the second on
    assert (naive - expected)[second].abs().max() > 0.01
    assert (good - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trap_02_scores_do_not_depend_on_the_batch(family):
    """Reward-model scores and loss: alone, behind a shared prompt, and with several prompts in one row."""
    model = tiny_model(family, num_labels=1).eval()
    trunk = model.base_model
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    responses = [[[20, 21, 1], [22, 1], [23, 24, 25, 1]], [[26, 1], [27, 28, 29, 1]]]
    rows = [prompt + response for prompt, group in zip(prompts, responses, strict=True) for response in group]
    alone = torch.cat([model.score(trunk(input_ids=torch.tensor([row]))[0])[0, -1] for row in rows])
    ranks = torch.tensor([0, 2, 1, 0, 1])

    def gradient(scores, cu_groups):
        loss = bradley_terry_loss(scores, ranks, cu_groups).loss
        return loss.detach(), torch.autograd.grad(loss, model.score.weight)[0]

    expected = gradient(alone, torch.tensor([0, 3, 5]))
    for max_tokens, number_of_rows in ((None, 2), (64, 1)):
        packed = pack_responses(prompts, responses, max_tokens=max_tokens)
        assert len(packed.input_ids) == number_of_rows
        fields = {name: getattr(packed, name) for name in ("input_ids", "position_ids", "attention_mask")}
        scores = model.score(trunk(**fields)[0]).flatten()[packed.last_token_rows]
        assert (scores - alone).abs().max() <= 1e-6
        torch.testing.assert_close(gradient(scores, packed.cu_groups), expected, rtol=1e-5, atol=1e-5)


def test_masked_garbage():
    """A pad id that is also a real token changes nothing; what the model computes at padding is finite and unread."""
    model = tiny_model("llama").eval()
    prompts, responses = [[5, 6], [7]], [[[8, 2], [9, 10, 2]], [[2]]]
    with torch.no_grad():
        runs = []
        for pad_token_id in (0, 2, 49):
            packed = pack_responses(prompts, responses, max_tokens=7, pad_token_id=pad_token_id)
            assert packed.input_ids.shape == (2, 7) and packed.input_ids[1, 2:].eq(pad_token_id).all()
            assert forward(model, packed).isfinite().all()
            runs.append(packed_log_probs(model, packed))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    packed = pack_responses(prompts, responses, max_tokens=7)
    read = torch.cat([packed.label_rows, packed.last_token_rows])
    assert packed.attention_mask.flatten(0, 2)[read].sum(1).gt(0).all() and read.max() < 7 + 2


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
