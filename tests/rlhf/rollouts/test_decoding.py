"""Texts that grow, in models that keep states, caches of their own or nothing, or that find positions by themselves."""

import pytest
import torch
from transformers import Cache

from rlhf.models.sequences import per_token_log_probs
from rlhf.rollouts import decoding
from rlhf.rollouts.decoding import JOINED, ONE_LENGTH, PADDED, STILL, WHOLE, chunks, way_of
from rlhf.rollouts.engines import load_engine
from rlhf.rollouts.sampling import sample
from tests.families import FAMILIES, family_model
from tests.roundings import assert_same

PROMPTS = [[3, 4, 6], [7], [3, 7, 8, 9, 10, 11], [3, 3, 5], [4, 12]]
WANTED = {
    "llama": PADDED, "roberta": PADDED, "lfm2": JOINED, "falcon_h1": JOINED, "mamba": JOINED, "mamba2": JOINED,
    "llama4_text": ONE_LENGTH, "bart": ONE_LENGTH, "mixtral": PADDED, "rwkv": WHOLE, "openai-gpt": WHOLE,
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def model(request):
    return family_model(request.param)


def misses(model, rollouts, noise, temperature):
    """How far each uniform number lies outside the span that its token has in the distribution of the text alone."""
    rows = noise.flatten(0, 1)
    for prompt, response, numbers in zip(rollouts.prompt_ids, rollouts.response_ids, rows, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].double()
        upper = (logits / temperature).softmax(-1).cumsum(-1)[len(prompt) - 1 : -1]
        upper = torch.cat([torch.zeros(len(response), 1, dtype=torch.float64), upper], dim=1)
        tokens = torch.tensor(response)[:, None]
        low, high = (upper.gather(1, column)[:, 0] for column in (tokens, tokens + 1))
        number = numbers[: len(response)]
        yield torch.maximum(low - number, number - high).clamp(min=0).max().item()


@pytest.mark.parametrize("stop", [[], [2, 5, 9]])
def test_samples_come_from_the_distribution_of_each_text_alone(model, stop):
    noise = torch.rand(len(PROMPTS), 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = {"response_length": 9, "temperature": 0.7, "stop_token_ids": stop, "samples_per_prompt": 3}
    rollouts = sample(model, None, PROMPTS, **options, noise=noise, batch_size=9)
    assert max(misses(model, rollouts, noise, 0.7)) < 1e-5  # fp32
    if not stop:
        assert {len(ids) for ids in rollouts.response_ids} == {9}


def test_the_log_probs_of_samples_are_those_of_each_text_alone(model):
    torch.manual_seed(0)
    rollouts = sample(model, None, PROMPTS, response_length=6, temperature=0.7, stop_token_ids=[2, 5])
    with torch.no_grad():
        log_probs, _, _ = per_token_log_probs(model, rollouts.prompt_ids, rollouts.response_ids, temperature=0.7)
        for row, (prompt, response) in enumerate(zip(PROMPTS, rollouts.response_ids, strict=True)):
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = (logits.double() / 0.7).log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
            assert_same(log_probs[row, : len(response)], expected, 2e-5)  # fp32


def test_the_way_is_the_fastest_that_is_right(model):
    assert way_of(model) == WANTED[model.config.model_type]


def test_a_cache_that_goes_on_wrongly_is_not_used(monkeypatch, caplog):
    model = family_model("llama")
    forward = type(model).forward

    def forgetful(self, input_ids=None, cache=None, past_key_values=None, use_cache=None, **inputs):
        given = cache if cache is not None else past_key_values
        output = forward(self, input_ids=input_ids, use_cache=use_cache, **inputs)
        output.logits = output.logits if given is None else output.logits + torch.arange(output.logits.shape[-1])
        return output

    assert way_of(family_model("llama")) == PADDED
    monkeypatch.setattr(type(model), "forward", forgetful)
    assert way_of(model) == WHOLE and "LlamaForCausalLM keeps no cache" in caplog.text


@pytest.mark.parametrize("family", ["falcon_h1", "llama", "mamba2", "mixtral"])
@pytest.mark.parametrize("precision", ["weights", "autocast"])
def test_half_precision_goes_the_same_way(family, precision):
    """Mamba 2 gives fp32 logits whatever it computes in."""
    expected = way_of(family_model(family))
    if precision == "weights":
        assert way_of(family_model(family).bfloat16()) == expected
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert way_of(family_model(family)) == expected
    assert expected != WHOLE


def test_where_rows_of_a_cache_cannot_be_moved_the_prompts_are_repeated(monkeypatch):
    options = {"response_length": 8, "temperature": 0.7, "stop_token_ids": [2, 5, 9], "samples_per_prompt": 3}
    noise = torch.rand(len(PROMPTS), 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = sample(family_model("llama"), None, PROMPTS, **options, noise=noise)
    monkeypatch.delattr(Cache, "reorder_cache")
    model = family_model("llama")
    assert way_of(model) == STILL
    assert sample(model, None, PROMPTS, **options, noise=noise) == expected


def test_rows_that_come_back_in_another_order_are_noticed(monkeypatch):
    monkeypatch.setattr(Cache, "reorder_cache", lambda cache, rows: None)
    assert way_of(family_model("llama")) == STILL


def test_chunks_of_prompts():
    prompts = [[0] * length for length in (3, 1, 3, 3, 1)]
    assert chunks(prompts, 2, one_length=False) == [[1, 4], [0, 2], [3]]
    assert chunks(prompts, 9, one_length=False) == [[1, 4, 0, 2, 3]]
    assert chunks(prompts, 9, one_length=True) == [[1, 4], [0, 2, 3]]
    assert chunks(prompts, 2, one_length=True) == [[1, 4], [0, 2], [3]]


@pytest.mark.parametrize("family, forwards", [("llama", 1 + 5), ("falcon_h1", 4 + 5), ("bart", 4 * 6)])
def test_texts_with_states_go_on_together(family, forwards):
    """Five prompts of four lengths, six tokens: read at once or length by length; then stepped together, or not."""
    model, seen = family_model(family), []
    way_of(model)
    model.register_forward_hook(lambda *args: seen.append(1))
    sample(model, None, PROMPTS, response_length=6, temperature=1.0, stop_token_ids=[], samples_per_prompt=2)
    assert len(seen) == forwards


def test_the_way_is_found_once(monkeypatch):
    model, tried = family_model("lfm2"), []
    holds = decoding._holds
    monkeypatch.setattr(decoding, "_holds", lambda *args: tried.append(args) or holds(*args))
    assert way_of(model) == way_of(model) == JOINED and len(tried) == 1


def test_a_router_loss_that_the_config_asks_for_is_not_computed():
    model = family_model("mixtral", output_router_logits=True)
    assert way_of(model) == PADDED
    prompts, responses = [[3, 4, 6], [7]], [[8, 9], [10, 11, 12]]
    with torch.no_grad():
        asked, _, _ = per_token_log_probs(model, prompts, responses, temperature=1.0, share_width=16)
        model.config.output_router_logits = False
        plain, _, _ = per_token_log_probs(model, prompts, responses, temperature=1.0)
    assert_same(asked, plain, 2e-5)  # fp32


def test_generate_gives_the_trainers_log_probs_or_is_refused(model):
    engine = load_engine("generate", batch_size=9)
    options = {"response_length": 8, "temperature": 0.7, "stop_token_ids": [2, 5], "samples_per_prompt": 3}
    if not way_of(model).cached:
        with pytest.raises(ValueError, match=r"rollout_engine: got generate for .*keeps no cache.*; use builtin$"):
            sample(model, None, PROMPTS, **options, engine=engine)
        return
    rollouts = sample(model, None, PROMPTS, **options, engine=engine, seed=1)
    with torch.no_grad():
        expected, mask, _ = per_token_log_probs(model, rollouts.prompt_ids, rollouts.response_ids, temperature=0.7)
    assert_same([x for row in rollouts.log_probs for x in row], expected[mask], 2e-5)  # fp32


def test_generate_batch_is_refused_where_texts_in_a_row_are_not_kept_apart(model):
    engine = load_engine("generate_batch")
    options = {"response_length": 4, "temperature": 0.7, "stop_token_ids": [2, 5]}
    if model.config.model_type in ("llama", "mixtral"):
        rollouts = sample(model, None, PROMPTS, **options, engine=engine, seed=1)
        with torch.no_grad():
            expected, mask, _ = per_token_log_probs(model, rollouts.prompt_ids, rollouts.response_ids, temperature=0.7)
        assert_same([x for row in rollouts.log_probs for x in row], expected[mask], 2e-5)  # fp32
        return
    others = "builtin or generate" if way_of(model).cached else "builtin"
    with pytest.raises(
        ValueError, match=f"rollout_engine: got generate_batch for .*continuous batching.*; use {others}$"
    ):
        sample(model, None, PROMPTS, **options, engine=engine)
