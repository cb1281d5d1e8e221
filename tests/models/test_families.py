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
    "llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "gemma3_text",
    "gemma3n_text", "gemma4", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "opt", "falcon", "phi", "phi3",
    "olmo2", "olmo3", "olmoe", "deepseek_v2", "deepseek_v3", "smollm3", "starcoder2", "stablelm", "granite",
    "granitemoe", "cohere", "cohere2", "glm4", "glm4_moe", "nemotron", "exaone4", "ernie4_5", "roberta",
    "deepseek_v3, yarn", "llama, tied head", "gemma4_text, experts",
)  # fmt: skip
REFUSED = dict.fromkeys(
    ("bloom", "gpt_neo", "mpt", "falcon, ALiBi", "qwen3_next", "qwen3_5", "lfm2", "mamba", "mamba2", "jamba", "bamba",
     "falcon_h1", "nemotron_h", "granitemoehybrid", "recurrent_gemma", "rwkv", "bart"), ("packing",)
)  # fmt: skip
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


def test_wrong_values_are_seen(monkeypatch):
    """A sampler whose temperature is off by a hundredth, and padded rows whose positions are off by one."""
    sample, per_token = sampling.sample, checks.per_token_log_probs
    monkeypatch.setattr(
        sampling, "sample", lambda *a, temperature, **k: sample(*a, temperature=1.01 * temperature, **k)
    )
    monkeypatch.setattr(checks, "per_token_log_probs", lambda m, p, r, **k: per_token(m, [q[1:] for q in p], r, **k))
    answers = checks.check("llama")
    assert answers["sampler"].startswith("WRONG") and answers["rows"].startswith("WRONG")
    assert answers["packing"].startswith("WRONG") and answers["log-probs"] == "ok"


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
