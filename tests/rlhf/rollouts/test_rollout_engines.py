"""Rollout engines: what they draw from, what becomes of lost or wrong completions, and log-probs that do not agree."""

import copy
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from rlhf.models import share_prompts
from rlhf.ppo import train_ppo
from rlhf.ppo.contract import ContractError
from rlhf.rollouts import engines as rollout_engines
from rlhf.rollouts.engines import gap_complaint, load_engine, log_prob_gap
from rlhf.rollouts.sampling import Completion, RolloutError, collect, sample
from tests.roundings import STORED, assert_same
from tests.tiny_ppo import equal, weights

V, STOP = 13, [2, 5]
PROMPTS = [[1, 4, 6], [1], [1, 7, 8, 9, 10, 11], [3, 3], [1, 12]]
SERVER = Path(__file__).resolve().parents[2] / "server_engine.py"
OURS = ("generate", "generate_batch")


def make_model(kind):
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, initializer_range=0.6, **ids,
        )  # fmt: skip
    else:
        config = GPT2Config(
            vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, **ids,
        )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).double()


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return make_model(request.param)


def run(model, engine, prompts=PROMPTS, *, batch_size=None, **options):
    settings = {"response_length": 12, "temperature": 0.7, "stop_token_ids": STOP, "seed": 0} | options
    engine = load_engine(engine, batch_size=batch_size) if isinstance(engine, str) else engine
    return sample(model, None, prompts, engine=engine, **settings)


def full_log_probs(model, prompt, response, temperature):
    """log p under the whole vocabulary, float64, one row without cache or padding; and the size of the logits."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0], logits.abs().max().item()


def assert_log_probs(model, rollouts, temperature):
    for prompt, response, given in zip(rollouts.prompt_ids, rollouts.response_ids, rollouts.log_probs, strict=True):
        expected, size = full_log_probs(model, prompt, response, temperature)
        assert_same(given, expected, STORED * size)  # the engines take the softmax in fp32


@pytest.mark.parametrize("engine", OURS)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("count", [1, 3])
def test_trap_12_log_probs_are_those_of_the_full_vocabulary(model, engine, temperature, count):
    rollouts = run(model, engine, temperature=temperature, samples_per_prompt=count)
    assert rollouts.prompt_ids == [prompt for prompt in PROMPTS for _ in range(count)]
    for response, ended in zip(rollouts.response_ids, rollouts.ended, strict=True):
        assert ended == (response[-1] in STOP) and not set(STOP) & set(response[:-1])
        assert ended or len(response) == 12
    assert_log_probs(model, rollouts, temperature)


@pytest.mark.parametrize("engine", OURS)
def test_frequencies_are_the_distribution_at_the_temperature(model, engine):
    count, prompt = 1_500, [1, 4, 6]
    rollouts = run(model, engine, [prompt], samples_per_prompt=count, response_length=1)
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1].double() / 0.7).softmax(-1)
    seen = torch.bincount(torch.tensor(rollouts.response_ids)[:, 0], minlength=V) / count
    assert ((seen - expected).abs() < 4.5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


@pytest.mark.parametrize("engine", OURS)
def test_settings_of_the_model_that_would_break_the_ratio_have_no_effect(model, engine):
    plain = run(model, engine, samples_per_prompt=2)
    model.generation_config.update(
        top_p=0.1, top_k=1, min_p=0.5, typical_p=0.2, min_length=9, min_new_tokens=9, repetition_penalty=3.0,
        no_repeat_ngram_size=1, suppress_tokens=[4], begin_suppress_tokens=[1, 3, 4], bad_words_ids=[[6]],
        eos_token_id=7, temperature=9.0, epsilon_cutoff=0.3, eta_cutoff=0.3, num_beams=4, max_new_tokens=2,
        forced_eos_token_id=3, sequence_bias={(4,): 9.0}, guidance_scale=2.0, num_return_sequences=3,
    )  # fmt: skip
    config = model.generation_config
    assert run(model, engine, samples_per_prompt=2) == plain
    assert model.generation_config is config and config.top_p == 0.1


@pytest.mark.parametrize("engine", OURS)
def test_no_stop_tokens_rows_at_a_time_and_what_is_left_behind(model, engine):
    model.train()
    rollouts = run(model, engine, stop_token_ids=[], batch_size=2)
    assert {len(ids) for ids in rollouts.response_ids} == {12} and not any(rollouts.ended)
    assert_log_probs(model, rollouts, 0.7)
    assert model.training and all(weight.grad is None for weight in model.parameters())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run(model, engine, samples_per_prompt=2, batch_size=3)
    assert torch.equal(state, torch.get_rng_state())


def test_generate_follows_from_its_seed_and_takes_it_from_the_generator(model):
    first = run(model, "generate", samples_per_prompt=2)
    assert first == run(model, "generate", samples_per_prompt=2) != run(model, "generate", samples_per_prompt=2, seed=1)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append([run(model, "generate", seed=None).response_ids for _ in range(2)])
    assert found[0] == found[1] and found[0][0] != found[0][1]


@pytest.mark.parametrize("engine", OURS)
def test_the_attention_of_packed_rows_comes_back(engine):
    model = make_model("llama")
    assert share_prompts([model]) and model.config._attn_implementation == "rlhf_shared_prefix"
    assert_log_probs(model, run(model, engine, samples_per_prompt=2), 0.7)
    assert model.config._attn_implementation == "rlhf_shared_prefix"


@pytest.mark.parametrize("engine", OURS)
def test_adapters_take_part(model, engine):
    peft = pytest.importorskip("peft", reason="the package peft is not installed: pip install peft")
    plain = run(model, engine)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert run(model, engine).response_ids == plain.response_ids
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    changed = run(model, engine)
    assert changed.response_ids != plain.response_ids
    assert_log_probs(model, changed, 0.7)


def test_a_diverged_model_is_an_error(model):
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(RolloutError, match="diverged"):
        run(model, "generate")
    with pytest.raises(RolloutError, match=r"\(prompt, sample\)|returned 0 of 5"):
        run(model, "generate_batch")


def rename(results, old, new):
    return {new if name == old else name: result for name, result in results.items()}


def edit(name, **fields):
    return lambda results: [setattr(results[name], field, value) for field, value in fields.items()] and results


FAULTS = {
    "fewer": (lambda r: {k: r[k] for k in list(r)[:-1]}, r"returned 9 of 10 completions; missing .*\(4, 0\)"),
    "none": (lambda r: {}, "returned 0 of 10"),
    "renamed": (lambda r: rename(r, "req_3", "req_17"), r"\(17, 0\).*not asked for"),
    "renamed otherwise": (
        lambda r: rename(r, "req_3", "batch-3"),
        "a request named 'batch-3', which was not asked for",
    ),
    "another sample": (lambda r: rename(r, "req_3", "req_3__child#4"), r"\(3, 5\).*not asked for"),
    "swapped": (lambda r: rename(rename(rename(r, "req_0", "x"), "req_2", "req_0"), "x", "req_2"), "another prompt's"),
    "error": (edit("req_1", error="out of memory"), r"\(1, 0\).*out of memory"),
    "not finished": (edit("req_1", status=2), r"\(1, 0\).*not finished"),
    "empty": (edit("req_1", generated_tokens=[], logprobs=[]), r"\(1, 0\).*empty"),
    "after stop": (edit("req_1", generated_tokens=[5, 4], logprobs=[-1.0, -1.0]), r"\(1, 0\).*goes on after a stop"),
    "log-probs lost": (edit("req_1", logprobs=[]), r"\(1, 0\) .* has no finite log-prob for each token"),
    "log-probs not finite": (edit("req_1", generated_tokens=[2], logprobs=[math.nan]), r"\(1, 0\) .* no finite"),
}


@pytest.fixture(scope="module")
def results():
    """What `generate_batch` of a model returned for two samples of each prompt."""
    model, found = make_model("llama"), []
    real = model.generate_batch
    model.generate_batch = lambda *args, **kwargs: found.append(real(*args, **kwargs)) or found[0]
    assert len(run(model, "generate_batch", samples_per_prompt=2).ended) == 10
    return found[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_trap_13_generate_batch_that_loses_or_renames_is_an_error(results, fault):
    change, message = FAULTS[fault]
    model = make_model("llama")
    model.generate_batch = lambda *args, **kwargs: change(copy.deepcopy(results))
    with pytest.raises(RolloutError, match=message):
        run(model, "generate_batch", samples_per_prompt=2)


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x.flip(0), lambda x: torch.cat([x, x[:1]])])
def test_trap_13_generate_that_loses_or_reorders_is_an_error(model, change):
    real = model.generate
    model.generate = lambda **kwargs: change(real(**kwargs))
    with pytest.raises(RolloutError, match="rows for 5, or others than given"):
        run(model, "generate")


def test_trap_13_log_probs_for_some_completions_only():
    completions = [Completion(0, 0, [1], [2], log_probs=[-1.0]), Completion(1, 0, [1], [2])]
    with pytest.raises(RolloutError, match="gave log-probs for 1 of 2 completions"):
        collect([[1], [1]], 1, completions, {2})


def test_a_server_of_ones_own(model):
    engine = load_engine(f"{SERVER}:Server")
    rollouts = run(model, engine, samples_per_prompt=2)
    torch.manual_seed(0)
    assert (
        rollouts.response_ids
        == sample(
            model, None, PROMPTS, response_length=12, temperature=0.7, stop_token_ids=STOP, samples_per_prompt=2
        ).response_ids
    )
    assert engine.updates == 1
    assert_log_probs(model, rollouts, 0.7)
    assert run(model, f"{SERVER}:silent").log_probs is None


@pytest.mark.parametrize(
    "name, message",
    [
        ("sglang", "got 'sglang', want builtin, generate, generate_batch, vllm or path/to/file.py:name"),
        ("engine.py", "got 'engine.py', want builtin"),
        ("engine.py:a b", "got 'engine.py:a b', want builtin"),
        ("/no/such/engine.py:Server", "there is no file /no/such/engine.py"),
        (f"{SERVER}:nothing", "defines no function or class 'nothing'"),
        (f"{SERVER}:constant", "defines no function or class 'constant'"),
    ],
)
def test_engines_that_are_not_there(name, message):
    with pytest.raises(ValueError, match=f"rollout_engine: .*{message}"):
        load_engine(name)


def test_the_gap_by_hand():
    """Gaps 0.5, -0.1, 0, 0.2 over four tokens; what stands under the mask may be anything."""
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    trainer = torch.tensor([[-1.0, -2.0], [-3.0, torch.nan], [-0.5, torch.inf]])
    gap = log_prob_gap([[-0.5, -2.1], [-3.0], [-0.3]], trainer, mask)
    expected = {
        "rollout/logprob_gap_mean": 0.2, "rollout/logprob_gap_max": 0.5, "rollout/logprob_bias": 0.15,
        "rollout/ratio_mean": (math.exp(-0.5) + math.exp(0.1) + 1 + math.exp(-0.2)) / 4,
        "rollout/ratio_max": math.exp(0.1), "rollout/upward": 0.25,
    }  # fmt: skip
    assert gap == pytest.approx(expected, abs=1e-7)
    assert gap_complaint(gap, None) is None and gap_complaint(gap, 0.2001) is None
    assert "by 0.2 nats a token in the mean (at most 0.5; more than 0.1" in gap_complaint(gap, 0.1)
    assert "another temperature or another dtype" in gap_complaint(gap, 0.1)
    assert "cut and renormalised (top_p, top_k, min_p)" in gap_complaint(gap | {"rollout/upward": 0.9}, 0.1)


@pytest.mark.parametrize("engine", ["generate", "generate_batch", f"{SERVER}:Server", f"{SERVER}:silent"])
def test_ppo_on_another_engine(home, engine):
    trainer = home.trainer(rollout_engine=engine, num_responses=2, temperature=0.7, local_rollout_batch_size=4)
    trainer.train()
    rows = home.rows()
    assert abs(rows[0]["objective/kl"]) == 0 and rows[1]["objective/kl"] != 0
    if engine.endswith("silent"):
        assert not any(name.startswith("rollout/") for name in rows[0]) and "engine_log_probs" not in trainer.contract
        return
    assert trainer.contract["engine_log_probs"] < 1e-5
    for row in rows:
        assert row["rollout/logprob_gap_max"] < 1e-4 and row["rollout/ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert row["rollout/logprob_gap_mean"] <= row["rollout/logprob_gap_max"]
    if engine.endswith("Server"):
        assert trainer.engine.updates == 3  # the start-up check and two iterations


def test_trap_28_resume_with_generate_is_the_same_to_the_bit(home):
    options = {"rollout_engine": "generate", "save_steps": 2, "num_responses": 2}
    train_ppo(home.config("whole", max_steps=4, **options))
    train_ppo(home.config("halves", max_steps=2, **options))
    torch.manual_seed(999)
    trainer = home.trainer("halves", max_steps=4, resume_from_checkpoint="true", **options)
    trainer.train()
    assert home.rows("whole", "samples.jsonl") == home.rows("halves", "samples.jsonl")
    whole = home.trainer("again", max_steps=4, **options)
    whole.train()
    assert equal(weights(whole.model), weights(trainer.model))


def test_trap_12_renormalised_log_probs_are_refused_at_the_start(home):
    message = r"engine_log_probs: the rollout engine's log-probs differ .* cut and renormalised \(top_p"
    with pytest.raises(ContractError, match=message):
        home.trainer(rollout_engine=f"{SERVER}:TopP")
    trainer = home.trainer("open", rollout_engine=f"{SERVER}:TopP", rollout_gap_limit=None)
    assert 0.1 < trainer.contract["engine_log_probs"] < 0.5
    trainer.args.rollout_gap_limit = 0.1
    with pytest.raises(RolloutError, match=r"cut and renormalised \(top_p.*; rollout_gap_limit sets the limit"):
        trainer.iteration()


def test_weights_that_are_not_updated_are_told_and_then_refused(home, caplog):
    options = {"rollout_engine": f"{SERVER}:Stale", "learning_rate": 3e-4, "max_steps": 12}
    with (
        caplog.at_level(logging.WARNING, "rlhf"),
        pytest.raises(RolloutError, match="weights that are not the policy's"),
    ):
        train_ppo(home.config(rollout_gap_warning=1e-3, **options))
    assert [record.message.partition(": ")[0] for record in caplog.records if "gap" in record.message] == [
        "iteration 2"
    ]
    gaps = [row["rollout/logprob_gap_mean"] for row in home.rows()]
    assert gaps[0] < 1e-5 and all(1e-3 < gap <= 0.1 for gap in gaps[1:]) and 2 < len(gaps) < 12
    told = json.loads((home.path / "run" / "run.json").read_text())["health"]
    assert [(entry["step"], entry["guard"]) for entry in told] == [(2, "rollout_gap")]
    train_ppo(home.config("open", rollout_gap_limit=None, rollout_gap_warning=None, **options))
    assert max(row["rollout/logprob_gap_mean"] for row in home.rows("open")) > 0.1
    assert json.loads((home.path / "open" / "run.json").read_text())["health"] == []


def test_the_engines_are_named_in_the_order_of_the_help():
    assert rollout_engines.ENGINES == ("builtin", "generate", "generate_batch", "vllm")
    assert load_engine("builtin") is None
