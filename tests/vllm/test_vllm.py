"""Rollouts by vLLM itself, on the CPU, against log-probs of our own; `make test-vllm`."""

import contextlib
import copy
import json
import os
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from rlhf import models
from rlhf.ppo import PPOConfig
from rlhf.rollouts.engines import load_engine
from rlhf.rollouts.sampling import sample
from tests.vllm.serving import BASE, LORA, ON_CPU, ROOT, UNTIED, Server

GAP = 1e-3  # nats a token; float32 on both sides, sums in another order
TEXTS = ["Once upon a time", "The dog", "Lily had a", "It was cold."] * 4
K, LENGTH = 3, 40
REWARD = """
def words(prompts, completions, **columns):
    return [float(text.count("happy") + text.count(".")) for text in completions]
"""


def serving(tmp_path_factory, *arguments):
    server = Server(tmp_path_factory.mktemp("server"), *arguments)
    try:
        yield server.wait()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    yield from serving(tmp_path_factory, *UNTIED)


@pytest.fixture(scope="module")
def lora_server(tmp_path_factory):
    yield from serving(tmp_path_factory, *LORA)


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(BASE)


@pytest.fixture
def policy():
    return models.load_policy(BASE).eval()


def engine_of(tmp_path, *servers, **options):
    urls = [server.url for server in servers] or None
    settings = PPOConfig(rollout_engine="vllm", vllm_server=urls, output_dir=str(tmp_path / "run"), **options)
    return load_engine("vllm", settings=settings)


def draw(engine, policy, tokenizer, **options):
    settings = {"response_length": LENGTH, "temperature": 0.8, "samples_per_prompt": K, "seed": 0}
    stop = {"stop_token_ids": models.stop_token_ids(tokenizer, policy)}
    prompts = [tokenizer.encode(text) for text in TEXTS]
    return sample(policy, tokenizer, prompts, engine=engine, **(settings | stop | options))


@torch.no_grad()
def gap(policy, rollouts, temperature=0.8) -> float:
    """The largest difference between vLLM's log-probs and those of a copy in float64, whole texts alone."""
    exact, found = copy.deepcopy(policy).double(), []
    for prompt, ids, told in zip(rollouts.prompt_ids, rollouts.response_ids, rollouts.log_probs, strict=True):
        logits = exact(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
        wanted = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        found.append(float((wanted - torch.tensor(told, dtype=torch.float64)).abs().max()))
    return max(found)


def disturb(policy):
    """Other weights, all of them by a fifth of their spread."""
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.data += 0.2 * weight.std() * torch.randn_like(weight)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probs_are_those_of_the_policy(server, policy, tokenizer, tmp_path, temperature):
    rollouts = draw(engine_of(tmp_path, server), policy, tokenizer, temperature=temperature)
    assert len(rollouts.response_ids) == K * len(TEXTS) and gap(policy, rollouts, temperature) < GAP


def test_a_response_ends_with_ppos_stop_tokens_alone(server, policy, tokenizer, tmp_path):
    """Not with EOS, where PPO's stop token is another one."""
    eos, stop = tokenizer.eos_token_id, tokenizer.encode(".")[-1]
    engine = engine_of(tmp_path, server)
    for stops in ([stop], [stop, eos], []):
        rollouts = draw(engine, policy, tokenizer, stop_token_ids=stops)
        for ids, ended in zip(rollouts.response_ids, rollouts.ended, strict=True):
            assert ended == (ids[-1] in stops) and (ended or len(ids) == LENGTH) and not set(ids[:-1]) & set(stops)
        assert any(rollouts.ended) == bool(stops)
    assert any(eos in ids for ids in rollouts.response_ids)


def test_samples_follow_from_the_seed(server, policy, tokenizer, tmp_path):
    engine = engine_of(tmp_path, server)
    first = draw(engine, policy, tokenizer, seed=5)
    assert draw(engine, policy, tokenizer, seed=5).response_ids == first.response_ids
    assert draw(engine, policy, tokenizer, seed=6).response_ids != first.response_ids
    assert len({tuple(ids) for ids in first.response_ids[:K]}) > 1


def test_the_distribution_is_the_policys(server, policy, tokenizer, tmp_path):
    """Counts of the first token of many samples; chi-squared of the likeliest ones."""
    samples, prompts = 60, [tokenizer.encode(TEXTS[0])] * 40
    settings = {
        "response_length": 1,
        "temperature": 1.3,
        "stop_token_ids": [],
        "samples_per_prompt": samples,
        "seed": 1,
    }
    rollouts = sample(policy, tokenizer, prompts, engine=engine_of(tmp_path, server), **settings)
    total = samples * len(prompts)
    with torch.no_grad():
        probs = (policy(torch.tensor([prompts[0]])).logits[0, -1].double() / 1.3).softmax(-1)
    counts = torch.bincount(torch.tensor(rollouts.response_ids)[:, 0], minlength=len(probs)).double()
    often = probs * total >= 5
    wanted = torch.cat([probs[often] * total, probs[~often].sum()[None] * total])
    found = torch.cat([counts[often], counts[~often].sum()[None]])
    freedom = len(wanted) - 1
    assert float(((found - wanted) ** 2 / wanted).sum()) < freedom + 5 * (2 * freedom) ** 0.5


def test_new_weights(server, policy, tokenizer, tmp_path):
    engine, before = engine_of(tmp_path, server), copy.deepcopy(policy)
    first = draw(engine, policy, tokenizer)
    for _ in range(3):
        disturb(policy)
        rollouts = draw(engine, policy, tokenizer)
        assert gap(policy, rollouts) < GAP < 0.1 < gap(before, rollouts)
    assert draw(engine, before, tokenizer).response_ids == first.response_ids


def adapters(policy):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    targets = ["q_proj", "v_proj", "down_proj"]
    policy = peft.get_peft_model(policy, peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    for name, weight in policy.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.05)
    return policy.eval()


def test_adapters(lora_server, policy, tokenizer, tmp_path):
    policy = adapters(policy)
    engine = engine_of(tmp_path, lora_server)
    for _ in range(2):
        rollouts = draw(engine, policy, tokenizer)
        assert engine.version.adapters and gap(policy, rollouts) < GAP
        with policy.disable_adapter():
            assert gap(policy, rollouts) > 0.1
        disturb(policy)
    assert lora_server.asked("/collective_rpc") == 0


def test_adapters_that_are_merged(server, policy, tokenizer, tmp_path):
    policy = adapters(policy)
    engine = engine_of(tmp_path, server)
    assert gap(policy, draw(engine, policy, tokenizer)) < GAP and not engine.version.adapters


def test_a_server_without_its_options_is_refused(lora_server, policy, tmp_path):
    with pytest.raises(ValueError, match=r"max_model_len 256, want at least 257"):
        engine_of(tmp_path, lora_server).check(adapters(policy), 257)
    with pytest.raises(ValueError, match=r"--hf-overrides '{\"tie_word_embeddings\": false}'"):
        engine_of(tmp_path, lora_server).check(models.load_policy(BASE), 100)


def test_in_the_process(policy, tokenizer, tmp_path, monkeypatch):
    for name, value in ON_CPU.items():
        monkeypatch.setenv(name, value)
    engine = engine_of(tmp_path, vllm_options=["enforce_eager=true", "max_num_seqs=64"])
    engine.check(policy, 100)
    first = draw(engine, policy, tokenizer)
    assert gap(policy, first) < GAP
    assert draw(engine, policy, tokenizer).response_ids == first.response_ids
    disturb(policy)
    assert gap(policy, draw(engine, policy, tokenizer)) < GAP
    monkeypatch.undo()
    engine.llm.llm_engine.engine_core.shutdown()


def ppo(tmp_path, server, *options, processes=1):
    """Start PPO as the command does, with the demo's prompts and a reward function, against a server."""
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    start = ["-m", "rlhf"]
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *start]
    command = [
        sys.executable, *start, "ppo", "--sft_model_path", "demo", "--dataset_name", tmp_path / "prompts.jsonl",
        "--reward_function", f"{tmp_path / 'reward.py'}:words", "--output_dir", tmp_path / "run", "--save_steps", "0",
        "--rollout_engine", "vllm", "--vllm_server", server.url, "--advantage", "grpo", "--num_responses", "8",
        "--rollout_batch_size", "128", "--per_device_train_batch_size", "32", "--num_ppo_epochs", "1",
        "--learning_rate", "3e-4", "--response_length", "60", "--temperature", "0.9", "--disable_tqdm", "true",
        "--rollout_gap_limit", str(GAP), *options,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([str(part) for part in command], env=environment, **pipes)


def finished(process, tmp_path, steps):
    """The metrics of a run that must have ended well, with samples of the right weights all along."""
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output[-4000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert max(row["rollout/logprob_gap_max"] for row in rows) < GAP
    assert rows[-1]["objective/kl"] > 0.05  # so that samples of older weights would have been seen
    return rows, output


def test_a_run_of_two_processes_with_one_server(server, tmp_path):
    loads = server.asked("/collective_rpc")
    process = ppo(tmp_path, server, "--max_steps", "3", processes=2)
    rows, _ = finished(process, tmp_path, 3)
    assert [row["episode"] for row in rows] == [128, 256, 384]
    assert server.asked("/collective_rpc") - loads in (3, 4)  # one for all processes; the check at the start is one
    assert len(list((tmp_path / "run" / "rollout_weights").iterdir())) == 1


def wait_for(condition, process):
    deadline = time.monotonic() + 900
    while not condition():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_is_killed_in_mid_rollout(server, tmp_path):
    process, metrics = ppo(tmp_path, server, "--max_steps", "4"), tmp_path / "run" / "metrics.jsonl"
    try:
        wait_for(lambda: metrics.exists() and metrics.read_text(), process)
        before = server.asked("/inference/v1/generate")
        wait_for(lambda: server.asked("/inference/v1/generate") > before, process)
        server.kill()
        time.sleep(3)
        server.start()
        _, output = finished(process, tmp_path, 4)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert "what it was sampling is sampled again" in output
    assert server.wait().asked("/collective_rpc") >= 3  # those of the second rollout again, and of two more
