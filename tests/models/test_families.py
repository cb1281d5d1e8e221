"""The most used families keep every claim of docs/models.md, or refuse where they are known to; and the net catches."""

import os
import re
import time

import pytest
import torch
import transformers

from rlhf import models
from rlhf.rollouts import sampling
from tests.models import checks, table
from tests.models.tiny_configs import families

QUICK = ("llama", "qwen3", "gemma3_text", "gpt2", "qwen3_5")
FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3",
    "gemma3_text", "gemma3n_text", "gemma4", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "opt", "falcon",
    "phi", "phi3", "phimoe", "olmo2", "olmo3", "olmoe", "deepseek_v2", "deepseek_v3", "smollm3", "starcoder2",
    "stablelm", "granite", "granitemoe", "cohere", "cohere2", "glm4", "glm4_moe", "nemotron", "exaone4", "ernie4_5",
    "minicpm3", "minimax_m2", "roberta", "deepseek_v3, yarn", "gemma4_text, experts", "gemma4_text, shared keys",
    "llama, tied head", "mixtral, output_router_logits", "opt, narrow embeddings",
)  # fmt: skip
NOT_PACKED = (
    "bloom", "gpt_neo", "mpt", "falcon, ALiBi", "llama4", "qwen3_next", "qwen3_5", "lfm2", "mamba", "mamba2",
    "jamba", "bamba", "falcon_h1", "minimax", "nemotron_h", "granitemoehybrid", "recurrent_gemma", "rwkv", "bart",
    "deepseek_v32",
)  # fmt: skip
REFUSED = {**dict.fromkeys(NOT_PACKED, ("packing",)), "inkling_text, padded vocabulary": ("log-probs", "packing")}
"""{family: claims that it must refuse}; every other claim, of these families too, must hold."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*FAMILIES, *REFUSED)]
)
def test_family(name):
    answers = table.answers(name)
    expected = {claim: "refused" if claim in REFUSED.get(name, ()) else "ok" for claim in checks.CLAIMS}
    assert {claim: answer.partition(":")[0] for claim, answer in answers.items()} == expected, answers


def test_page_is_of_the_pinned_transformers():
    """docs/models.md has a row for each causal language model of the version in constraints.txt."""
    pinned = re.search(r"^transformers==(\S+)$", (checks.ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    if transformers.__version__ != pinned:
        pytest.skip(f"needs transformers {pinned}, the table's version; {transformers.__version__} is installed")
    page = table.PAGE.read_text()
    assert f"transformers {pinned}" in page, "make test-models writes the table again"
    rows = re.findall(r"^\| ([\w-]+(?:, [^|]+)?) \|", page[page.index(table.BEGIN) :], re.MULTILINE)
    assert [*families(), *table.VARIANTS] == [name for name in rows if name not in table.WORDS.values()]


def _hotter(right):
    return lambda *args, temperature, **options: right(*args, temperature=1.003 * temperature, **options)


def _moved(right):
    return lambda *args: 1.001 * right(*args)


def _other_weights(right):
    def load(*args, **options):
        model = right(*args, **options)
        model.lm_head.weight.data *= 1.001
        return model

    return load


def _noise_in_training(right):
    def spoil(model, inputs, output):
        if model.training:
            output.logits *= 1.001

    def load(*args, **options):
        model = right(*args, **options)
        model.register_forward_hook(spoil)
        return model

    return load


def _all_in_sight(right):
    """Each response sees those before it in its row."""

    def inputs(model, packed):
        mask = torch.ones_like(packed.attention_mask).tril()
        return {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "attention_mask": mask}

    return inputs


FAULTS = {
    "load": (models, "load_policy", _other_weights),
    "log-probs": (checks, "linear_logprobs_from_model", _hotter),
    "rows": (checks, "per_token_log_probs", _hotter),
    "packing": (checks, "packed_inputs", _all_in_sight),
    "sampler": (sampling, "sample", _hotter),
    "train mode": (models, "load_policy", _noise_in_training),
    "reward model": (models, "token_scores", _moved),
}


@pytest.mark.parametrize("claim", checks.CLAIMS)
def test_a_small_fault_is_seen(claim, tmp_path, monkeypatch):
    """Each check fails when what it checks is off by some thousandths, and says by how much."""
    owner, name, spoil = FAULTS[claim]
    monkeypatch.setattr(owner, name, spoil(getattr(owner, name)))
    answers = checks._check(checks._case("llama", {}, tmp_path), [claim])
    assert answers[claim].startswith("WRONG")


def test_answers_of_errors(monkeypatch):
    """An error of the package's own, of one line, is a refusal; one of another package, or a long one, a crash."""
    settings = {"response_length": 1, "temperature": 0.0, "stop_token_ids": []}
    calls = {
        "refused: temperature: got 0.0": lambda case: sampling.sample(None, None, [[1]], **settings),
        "CRASH RuntimeError: inconsistent tensor size": lambda case: torch.zeros(2).dot(torch.zeros(3)),
        "CRASH ValueError: xxx": lambda case: models.as_policy(None, name="x" * 600),
        "transformers: told": (lambda case: 1 / 0),
    }
    for answer, call in calls.items():
        own_fault = (lambda case: "told") if answer.startswith("transformers") else None
        monkeypatch.setitem(checks.CHECKS, "load", (call, own_fault))
        assert checks._answer(None, "load").startswith(answer)


def test_processes_that_die_or_hang(monkeypatch):
    """Each answers for itself, and the others go on."""
    monkeypatch.setattr(table, "TIMEOUT", 3)
    ends = {"dies": lambda: os._exit(3), "hangs": lambda: time.sleep(99), "lives": lambda: {"load": "ok"}}
    monkeypatch.setattr(table, "answers", lambda name: ends[name]())
    found = table.run(list(ends), processes=2)
    assert {name: answer["load"] for name, answer in found.items()} == {
        "dies": "CRASH the process ended with 3", "hangs": "CRASH it took more than 3 seconds", "lives": "ok",
    }  # fmt: skip
