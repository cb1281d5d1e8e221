"""Sampling and the log-probs of samples, against loops without cache or padding and against the full vocabulary."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from rlhf import models
from rlhf.models.sequences import by_length, join, response_log_probs, response_scores, response_values
from rlhf.rollouts import sampling as rollout
from rlhf.rollouts.sampling import Completion, RolloutError, per_token_log_probs, sample
from tests.roundings import assert_same
from tests.tiny import model_folder, word_tokenizer

V, STOP = 13, [2, 5]
PROMPTS = [[1, 4, 6], [1], [1, 7, 8, 9, 10, 11], [3, 3], [1, 12]]


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        config = LlamaConfig(
            vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, initializer_range=0.6,
        )  # fmt: skip
    else:
        config = GPT2Config(
            vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.6, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def run(model, prompts=PROMPTS, *, seed=0, **options):
    torch.manual_seed(seed)
    settings = {"response_length": 12, "temperature": 0.7, "stop_token_ids": STOP} | options
    return sample(model, None, prompts, **settings)


def naive(model, prompts, noise, temperature, steps):
    """Row by row, no cache, no padding: the token where the float64 distribution function passes the row's number."""
    responses = []
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            ids = list(prompt)
            for t in range(steps):
                logits = model(torch.tensor([ids])).logits[0, -1].double() / temperature
                ids.append(int((logits.softmax(-1).cumsum(-1) <= noise[row, t]).sum()))
                if ids[-1] in STOP:
                    break
            responses.append(ids[len(prompt) :])
    return responses


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sample_equals_the_loop_without_cache(model, temperature):
    rollouts = run(model, temperature=temperature)
    torch.manual_seed(0)
    noise = torch.rand(len(PROMPTS), 1, 12, dtype=torch.float64)[:, 0]
    assert rollouts.response_ids == naive(model, PROMPTS, noise, temperature, 12)
    assert rollouts.prompt_ids == PROMPTS
    assert rollouts.ended == [ids[-1] in STOP for ids in rollouts.response_ids]
    assert {len(ids) for ids in rollouts.response_ids} != {12} or model.config.model_type == "gpt2"


def test_given_noise_chooses_the_tokens(model):
    noise = torch.rand(len(PROMPTS), 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = run(model, samples_per_prompt=2, noise=noise).response_ids
    assert found[::2] == naive(model, PROMPTS, noise[:, 0], 0.7, 12)
    assert found[1::2] == naive(model, PROMPTS, noise[:, 1], 0.7, 12)
    assert run(model, PROMPTS[2:], samples_per_prompt=2, noise=noise[2:]).response_ids == found[4:]


def test_samples_do_not_depend_on_the_batch(model):
    whole = run(model, samples_per_prompt=3)
    assert whole.prompt_ids == [prompt for prompt in PROMPTS for _ in range(3)]
    assert run(model, samples_per_prompt=3, batch_size=3) == run(model, samples_per_prompt=3, batch_size=7) == whole
    assert run(model, samples_per_prompt=3, seed=1) != whole
    assert run(model, PROMPTS[:1]).response_ids == run(model).response_ids[:1]


def test_frequencies_are_the_distribution_at_the_temperature(model):
    count = 4_000
    rollouts = run(model, PROMPTS[:1], samples_per_prompt=count, response_length=1)
    with torch.no_grad():
        expected = (model(torch.tensor(PROMPTS[:1])).logits[0, -1].double() / 0.7).softmax(-1)
    seen = torch.bincount(torch.tensor(rollouts.response_ids)[:, 0], minlength=V) / count
    assert ((seen - expected).abs() < 4.5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_generation_config_has_no_effect_and_is_named(model):
    plain = run(model)
    model.generation_config.update(top_p=0.1, top_k=1, min_length=9, repetition_penalty=3.0, eos_token_id=7)
    assert run(model) == plain
    with pytest.warns(UserWarning, match=r"'top_k': 1, 'top_p': 0.1, 'min_length': 9, 'repetition_penalty': 3.0"):
        rollout.warn_ignored_sampling_settings(model)


def test_every_setting_that_cuts_or_bends_is_named_and_neutral_ones_are_not(model):
    model.generation_config.update(
        top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, repetition_penalty=1.0, suppress_tokens=[], num_beams=1,
        guidance_scale=1.0, temperature=0.3, do_sample=True,
    )  # fmt: skip
    assert rollout.ignored_sampling_settings(model) == {}
    bent = {
        "min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "min_new_tokens": 2,
        "no_repeat_ngram_size": 2, "bad_words_ids": [[3]], "suppress_tokens": [4], "begin_suppress_tokens": [4],
        "sequence_bias": [[[4], 2.0]], "forced_eos_token_id": 5, "guidance_scale": 2.0, "num_beams": 4,
    }  # fmt: skip
    model.generation_config.update(**bent)
    assert rollout.ignored_sampling_settings(model) == bent


def test_no_stop_tokens_and_a_masked_vocabulary(model):
    rollouts = run(model, stop_token_ids=[])
    assert not any(rollouts.ended) and {len(ids) for ids in rollouts.response_ids} == {12}
    forward = model.forward

    def only_four(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = torch.where(torch.arange(V) == 4, output.logits, -torch.inf)
        return output

    model.forward = only_four
    assert run(model).response_ids == [[4] * 12] * len(PROMPTS)


def test_train_mode_comes_back_and_no_gradient_is_kept(model):
    model.train()
    run(model)
    assert model.training and all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_trap_12_log_probs_belong_to_the_full_vocabulary(model, temperature):
    model = model.double()
    rollouts = run(model, temperature=temperature)
    log_probs, mask, entropy = per_token_log_probs(
        model, rollouts.prompt_ids, rollouts.response_ids, temperature=temperature
    )
    assert mask.tolist() == [[t < len(ids) for t in range(mask.shape[1])] for ids in rollouts.response_ids]
    for row, (prompt, response) in enumerate(zip(PROMPTS, rollouts.response_ids, strict=True)):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double() / temperature
        expected = logits.log_softmax(-1)
        chosen = expected.gather(-1, torch.tensor(response)[:, None])[:, 0]
        assert_same(log_probs[row, : len(response)], chosen)
        plogp = -(expected.exp() * expected).sum(-1)
        assert_same(entropy[row, : len(response)], plogp)
    assert (log_probs[~mask] == 0).all() and (entropy[~mask] == 0).all()
    log_probs.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_log_probs_of_a_model_that_scales_its_logits():
    from transformers import CohereConfig

    config = CohereConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.6,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    log_probs, _, _ = per_token_log_probs(model, [[1, 4]], [[6, 7]], temperature=0.7)
    full = (model(torch.tensor([[1, 4, 6, 7]])).logits[0, 1:3].double() / 0.7).log_softmax(-1)
    expected = torch.stack([full[0, 6], full[1, 7]])
    torch.testing.assert_close(log_probs[0].double(), expected, rtol=0, atol=1e-5)


def test_join():
    batch = join([[1, 4], [3]], [[6, 7, 2], []])
    assert batch.input_ids.tolist() == [[1, 4, 6, 7, 2], [3, 0, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 0, 0, 0, 0]]
    assert batch.response_mask.tolist() == [[True] * 3, [False] * 3]
    assert batch.rows.tolist() == [1, 2, 3]
    assert batch.labels.tolist() == [6, 7, 2] and batch.last_rows.tolist() == [4, 5]
    assert batch.unpack(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1, 2, 3], [0, 0, 0]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trap_02_shared_prompts_change_nothing(tmp_path, family):
    """Equal prompts computed once: log-probs, entropies, values, scores, gradients as from a row for each response."""
    tokenizer = word_tokenizer()
    folder = model_folder(tmp_path, family=family, tokenizer=tokenizer)
    policy, value = models.load_policy(folder), models.reward_model_from_policy(folder, 0, pad_token_id=0)
    policy, value = policy.double(), value.double()
    assert models.share_prompts([policy, value])
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(3, len(tokenizer), (length,), generator=generator).tolist()

    long, short = ids(20), ids(17)
    prompts = [long, short, long, ids(4), short, long]  # out of order
    responses = [ids(5), ids(3), ids(1), ids(6), ids(2), ids(4)]
    results = []
    for width in (None, policy.config.hidden_size):
        batch = join(prompts, responses, share_width=width)
        log_probs, entropy = response_log_probs(policy, batch, temperature=0.7)
        values, scores = response_values(value, batch), response_scores(value, batch)
        loss = (log_probs * torch.linspace(-1, 1, len(log_probs))).sum() + entropy.mean()
        grads = torch.autograd.grad(loss, list(policy.parameters()))
        unpacked = [batch.unpack(x) for x in (log_probs, entropy, values)]
        results.append((batch.input_ids.numel(), [*unpacked, scores], grads))
    (apart, wanted, wanted_grads), (together, found, found_grads) = results
    assert together < 0.7 * apart
    for a, b in zip(found, wanted, strict=True):
        assert_same(a, b)
    for a, b in zip(found_grads, wanted_grads, strict=True):
        assert_same(a, b)


def test_by_length_keeps_prompts_together():
    prompts, responses = [[1] * 9, [2], [1] * 9, [2], [3] * 4], [[5] * 2, [5], [5], [5] * 6, [5]]
    order = by_length(prompts, responses)
    assert order == [4, 1, 3, 2, 0]
    assert by_length(prompts, responses, [0, 3, 2]) == [3, 2, 0]


def faulty(change):
    """An engine whose completions were changed on the way."""

    def engine(model, tokenizer, prompt_ids, *, samples_per_prompt, **settings):
        completions = [
            Completion(prompt, number, list(ids), [4, 2])
            for prompt, ids in enumerate(prompt_ids)
            for number in range(samples_per_prompt)
        ]
        return change(completions) or completions

    return engine


def edit(position, **fields):
    return lambda completions: [completions[position].__setattr__(name, value) for name, value in fields.items()][:0]


FAULTS = {
    "fewer": (lambda c: c[:-1], r"returned 9 of 10 completions; missing \(prompt, sample\): \[\(4, 1\)\]"),
    "none": (lambda c: iter(()), "returned 0 of 10"),
    "renamed": (edit(3, prompt=17), r"\(17, 1\).*not asked for"),
    "twice": (lambda c: [*c, c[0]], r"\(0, 0\).*twice"),
    "swapped prompts": (edit(0, prompt_ids=[9]), r"\(0, 0\).*another prompt's ids"),
    "error": (edit(2, error="out of memory"), r"\(1, 0\).*out of memory"),
    "empty": (edit(2, response_ids=[]), r"\(1, 0\).*empty"),
    "after stop": (edit(2, response_ids=[5, 4]), r"\(1, 0\).*goes on after a stop token"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_trap_13_an_engine_that_loses_or_renames_is_an_error(model, fault):
    change, message = FAULTS[fault]
    with pytest.raises(RolloutError, match=message):
        run(model, samples_per_prompt=2, engine=faulty(change))


def test_trap_13_any_order_is_put_right(model):
    def shuffled(completions):
        for number, completion in enumerate(completions):
            completion.response_ids = [6 + number % 3, 2]
        return completions[::-1]

    rollouts = run(model, samples_per_prompt=2, engine=faulty(shuffled))
    assert rollouts.prompt_ids == [prompt for prompt in PROMPTS for _ in range(2)]
    assert rollouts.response_ids == [[6 + number % 3, 2] for number in range(10)] and all(rollouts.ended)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"response_length": 0}, "response_length: got 0"),
        ({"samples_per_prompt": 0}, "samples_per_prompt: got 0"),
        ({"response_length": 27}, "the longest prompt has 6 tokens; with response_length 27 .* context of 32"),
        ({"prompts": [[1], []]}, "a prompt is empty"),
        ({"noise": torch.zeros(5, 12)}, r"noise: got shape \(5, 12\), want \(5, 1, 12\)"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(ValueError, match=message):
        run(model, **options)


def test_a_diverged_model_is_an_error(model):
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(RolloutError, match="diverged"):
        run(model)
