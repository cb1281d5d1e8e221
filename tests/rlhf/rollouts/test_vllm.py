"""vLLM's servers as a rollout engine: what is sampled, which weights they have, and what becomes of their faults."""

import copy
import json
import logging
import math
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf.ppo import PPOConfig
from rlhf.rollouts import vllm_server, vllm_servers
from rlhf.rollouts.engines import load_engine
from rlhf.rollouts.sampling import RolloutError, sample
from rlhf.rollouts.vllm import named_values
from rlhf.rollouts.vllm_answers import seed_of
from rlhf.rollouts.vllm_servers import VllmServers
from rlhf.rollouts.vllm_weights import WeightFolders
from tests.fake_server import Died
from tests.fake_vllm import FakeVllm

V, STOP, K = 13, [2, 5], 3
PROMPTS = [[1, 4, 6], [1], [1, 7, 8, 9, 10, 11], [3, 3], [1, 12]]


def make_model(seed=0, tie=False):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.6, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=tie,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).double()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(vllm_server, "POLL_SECONDS", 0.02)


@pytest.fixture
def policy():
    return make_model()


@pytest.fixture
def start(request):
    """Starts servers, with first weights that are not the policy's, which stop with the test."""

    def start(*arguments, **config):
        server = FakeVllm(make_model(seed=9), *arguments, **config)
        request.addfinalizer(server.stop)
        return server

    return start


def engine_of(tmp_path, *servers, timeout=5.0):
    weights = WeightFolders(tmp_path / "weights", own=True)
    return VllmServers([server.url for server in servers], timeout=timeout, weights=weights)


def draw(engine, policy, prompts=PROMPTS, **options):
    settings = {"response_length": 12, "temperature": 0.7, "stop_token_ids": STOP, "samples_per_prompt": K, "seed": 0}
    return sample(policy, None, prompts, engine=engine, **(settings | options))


@torch.no_grad()
def gap(policy, rollouts, temperature=0.7) -> float:
    """The largest difference between the log-probs told and those of whole texts, alone, in float64."""
    found = []
    for prompt, ids, told in zip(rollouts.prompt_ids, rollouts.response_ids, rollouts.log_probs, strict=True):
        logits = policy(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double() / temperature
        wanted = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        found.append(float((wanted - torch.tensor(told, dtype=torch.float64)).abs().max()))
    return max(found)


class Faults:
    """Errs at the first `times` requests for samples as `fault` says, and counts them."""

    def __init__(self, fault, times=1):
        self.fault, self.left, self.count = fault, times, 0

    def __call__(self, body, answer):
        self.count += 1
        if self.left == 0:
            return answer
        self.left -= 1
        return self.fault(body, answer)


def die(body, answer):
    raise Died(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + json.dumps(answer).encode()[:100])


def changed(**parts):
    """A fault that changes the first choice of an answer; a function is called with what stands there."""

    def fault(body, answer):
        answer = copy.deepcopy(answer)
        for name, value in parts.items():
            choice = answer["choices"][0]
            choice[name] = value(choice[name]) if callable(value) else value
        return answer

    return fault


def test_ids_ends_and_log_probs_are_the_policys(start, policy, tmp_path):
    servers = [start(), start()]
    rollouts = draw(engine_of(tmp_path, *servers), policy)
    assert rollouts.prompt_ids == [prompt for prompt in PROMPTS for _ in range(K)]
    assert gap(policy, rollouts) < 1e-12 and gap(servers[0].model, rollouts) < 1e-12
    for ids, ended in zip(rollouts.response_ids, rollouts.ended, strict=True):
        assert ended == (ids[-1] in STOP) and (ended or len(ids) == 12) and not set(ids[:-1]) & set(STOP)
    assert any(rollouts.ended) and not all(rollouts.ended)


def test_what_a_server_is_asked_for_leaves_the_distribution_whole(start, policy, tmp_path):
    server = start()
    draw(engine_of(tmp_path, server), policy)
    asked = [body for _, path, body in server.asked if path == "/inference/v1/generate"][1:]  # the first was a trial
    assert sorted(body["token_ids"] for body in asked) == sorted(PROMPTS)
    for body in asked:
        assert body["sampling_params"] == {
            "n": K, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_tokens": 0, "max_tokens": 12,
            "stop_token_ids": STOP, "ignore_eos": True, "logprobs": 0, "detokenize": False,
            "seed": seed_of(0, PROMPTS.index(body["token_ids"])),
        }  # fmt: skip


def test_samples_follow_from_the_seed(start, policy, tmp_path):
    one, two = engine_of(tmp_path / "a", start()), engine_of(tmp_path / "b", start(), start())
    first = draw(one, policy, seed=3)
    assert draw(two, policy, seed=3) == draw(one, policy, seed=3) == first
    assert draw(one, policy, seed=4).response_ids != first.response_ids
    same = draw(one, policy, [PROMPTS[0]] * 2, seed=3).response_ids
    assert same[:K] == first.response_ids[:K] and same[:K] != same[K:] and same[0] != same[1]


def test_seeds_are_unlike_and_survive_json():
    seeds = [seed_of(seed, prompt) for seed in (0, 1, 2**31 - 1) for prompt in range(100)]
    assert len(set(seeds)) == 300 and all(json.loads(json.dumps(float(seed))) == seed for seed in seeds)


def test_new_weights_before_each_rollout(start, policy, tmp_path):
    server = start()
    engine, found = engine_of(tmp_path, server), []
    for seed in range(3):
        for weight in policy.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        rollouts = draw(engine, policy, seed=seed)
        assert gap(policy, rollouts) < 1e-12
        found.append(engine.version.name)
        assert [folder.name for folder in (tmp_path / "weights").iterdir()] == [engine.version.name]
    assert len(set(found)) == 3 and server.loads() == 3
    assert set(found).isdisjoint({WeightFolders(tmp_path, own=True).write(policy).name})


@pytest.mark.parametrize("fault", [
    die, lambda body, answer: (500, {"error": {"message": "engine error"}}), lambda body, answer: (503, b""),
    changed(finish_reason="abort"),
    changed(weight_versions=lambda spans: [{"version": "rlhf-other-1", "start": 0, "end": 3}, *spans]),
])  # fmt: skip
def test_what_a_server_loses_is_sampled_again(start, policy, tmp_path, fault):
    wanted = draw(engine_of(tmp_path / "a", start()), policy)
    faults = Faults(lambda body, answer: answer, 0)
    engine = engine_of(tmp_path / "b", start(faults), start())
    engine.update_weights(policy)
    faults.fault, faults.left = fault, 2
    assert draw(engine, policy) == wanted and faults.left == 0


def test_a_server_that_was_started_again_gets_the_weights_before_it_samples(start, policy, tmp_path):
    wanted = draw(engine_of(tmp_path / "a", start()), policy)

    def restart(body, answer):
        server.restart()
        return {**answer, "choices": [server.choice(body["token_ids"], body["sampling_params"], k) for k in range(K)]}

    faults = Faults(restart, 0)
    server = start(faults)
    engine = engine_of(tmp_path / "b", server)
    engine.update_weights(policy)
    faults.left = 1
    assert draw(engine, policy) == wanted and server.loads() == 3


def test_a_server_that_is_killed_and_comes_back(start, policy, tmp_path, caplog):
    wanted = draw(engine_of(tmp_path / "a", start()), policy)

    def kill(body, answer):
        threading.Thread(target=stop).start()
        gone.wait(5)
        raise Died

    def stop():
        server.stop()
        gone.set()
        server.restart()
        threading.Timer(0.3, server.start).start()

    gone, faults = threading.Event(), Faults(kill, 0)
    server = start(faults)
    engine = engine_of(tmp_path / "b", server)
    engine.update_weights(policy)
    faults.left = 1
    with caplog.at_level(logging.WARNING, "rlhf"):
        assert draw(engine, policy) == wanted and server.loads() == 3
    told = ("it is waited for up to 5 s (vllm_timeout)", f"{server.url} is back, with weights {engine.version.name}")
    assert [caplog.text.count(text) for text in told] == [1, 1]  # however many prompts were under way


def test_the_others_go_on_while_one_is_gone(start, policy, tmp_path, caplog):
    wanted = draw(engine_of(tmp_path / "a", start()), policy)
    servers = [start(), start()]
    engine = engine_of(tmp_path / "b", *servers, timeout=60.0)
    engine.check(policy, 20)
    servers[0].stop()
    servers[0].restart()
    with caplog.at_level(logging.WARNING, "rlhf"):
        assert draw(engine, policy) == wanted
    assert servers[0].url in caplog.text and "the others go on" in caplog.text
    servers[0].start()
    assert draw(engine, policy) == wanted and servers[0].loads() == 1


def test_a_rollout_ends_where_no_server_comes_back(start, policy, tmp_path):
    server = start()
    engine = engine_of(tmp_path, server, timeout=0.3)
    engine.update_weights(policy)
    server.stop()
    with pytest.raises(RolloutError, match=r"vllm_server: GET .*ConnectionRefusedError.*given up after 0.3 s"):
        draw(engine, policy)
    update, engine.update_weights = engine.update_weights, lambda policy: None
    with pytest.raises(RolloutError, match=r"given up after 0.3 s \(vllm_timeout\)"):
        draw(engine, policy)
    engine.update_weights = update
    server.start()
    assert gap(policy, draw(engine, policy)) < 1e-12


def test_a_server_that_is_slow(start, policy, tmp_path):
    wanted, stop = draw(engine_of(tmp_path / "a", start()), policy), threading.Event()

    def wait(body, answer):
        server.working.release()
        stop.wait(10)
        server.working.acquire()
        return answer

    faults = Faults(wait, 0)
    server = start(faults)
    engine = engine_of(tmp_path / "b", server, start(), timeout=0.5)
    engine.update_weights(policy)
    faults.left = 1
    assert draw(engine, policy) == wanted
    alone = engine_of(tmp_path / "c", server, timeout=0.5)
    alone.update_weights(policy)
    faults.left = 100
    with pytest.raises(RolloutError, match=r"sampled 4 times without success: .* no answer within 0.5 s"):
        draw(alone, policy, PROMPTS[:1])
    stop.set()


WRONG = {
    "a lost row": (lambda body, answer: {**answer, "choices": answer["choices"][1:]}, "14 of 15"),
    "a repeated row": (lambda body, answer: {**answer, "choices": answer["choices"] * 2}, "twice"),
    "another prompt's row": (lambda body, answer: {**answer, "prompt_token_ids": [1, 2, 3]}, "another prompt's ids"),
    "a row that was not asked for": (changed(index=7), r"\(\d, 7\).*not asked for"),
    "other tokens' log-probs": (changed(token_ids=lambda ids: [ids[0] + 1, *ids[1:]]), "log-probs of other tokens"),
    "an id that is none": (
        changed(token_ids=lambda ids: [V, *ids[1:]], logprobs=lambda told: {"content": [
            {"token_id": V, "logprob": -1.0}, *told["content"][1:]]}), "outside of the policy's vocabulary of 13"),
    "a log-prob that is NaN": (
        changed(logprobs=lambda told: {"content": [
            {**entry, "logprob": math.nan} for entry in told["content"]]}), "no finite log-prob"),
    "a log-prob that is -inf": (
        changed(logprobs=lambda told: {"content": [
            {**entry, "logprob": -9999.0} for entry in told["content"]]}), "may have diverged"),
    "a log-prob that is null": (
        changed(logprobs=lambda told: {"content": [{**entry, "logprob": None} for entry in told["content"]]}),
        "may have diverged"),
    "an error": (changed(finish_reason="error"), "finish_reason 'error'"),
    "an empty response": (changed(token_ids=[], logprobs={"content": []}), "has 0 tokens and ends with no stop"),
    "no versions": (changed(weight_versions=None), "does not answer as vLLM"),
    "no choices": (lambda body, answer: {}, "does not answer as vLLM"),
    "a refusal": (lambda body, answer: (400, {"error": {"message": "n is too large"}}), "400, n is too large"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rows_stop_the_run(start, policy, tmp_path, name):
    fault, text = WRONG[name]
    faults = Faults(fault, 0)
    engine = engine_of(tmp_path, start(faults))
    engine.update_weights(policy)
    faults.left = 1
    with pytest.raises(RolloutError, match=text):
        draw(engine, policy)


def test_a_response_that_the_servers_length_cut_off(start, policy, tmp_path):
    server = start(model_config={"max_model_len": 8})
    engine = engine_of(tmp_path, server)
    with pytest.raises(RolloutError, match="has 2 tokens and ends with no stop token, want one or 12 tokens"):
        draw(engine, policy, PROMPTS[2:3])


def test_a_server_that_never_has_the_weights(start, policy, tmp_path):
    stale = changed(weight_versions=[{"version": "old", "start": 0, "end": 1}])
    engine = engine_of(tmp_path, start(Faults(stale, 100)))
    with pytest.raises(RolloutError, match=r"4 times without success: .* sampled with weights \['old'\], want rlhf-"):
        draw(engine, policy, PROMPTS[:1])


def test_a_server_that_forgets_the_version(start, policy, tmp_path):
    server = start()
    engine = engine_of(tmp_path, server)
    real = server.update_weight_version
    server.update_weight_version = lambda body: (200, {}) if "loading" not in body["new_version"] else real(body)
    with pytest.raises(RolloutError, match=r"was given weights rlhf-.*, and says it has others"):
        draw(engine, policy)


def test_weights_that_a_server_cannot_read(start, policy, tmp_path):
    server = start()
    engine = engine_of(tmp_path, server)
    server.collective_rpc = lambda body: (500, {"error": {"message": "no such file"}})
    with pytest.raises(RolloutError, match=r"no such file.*can it read .*weights.*\(vllm_weights_dir\)"):
        draw(engine, policy)


def test_weights_are_not_loaded_twice_by_two_processes(start, policy, tmp_path):
    """Two engines on a server that has lost its weights, of which either would load the same ones."""
    server = start()
    first = engine_of(tmp_path, server)
    first.update_weights(policy)
    second = engine_of(tmp_path, server)
    second.check(policy, 20)
    second.version, first.alone, second.alone = first.version, False, False
    server.restart()
    before, found = server.loads(), {}

    def work(name, engine):
        settings = {"response_length": 12, "temperature": 0.7, "stop_token_ids": STOP, "samples_per_prompt": K}
        found[name] = engine(policy, None, PROMPTS, seed=0, **settings)

    threads = [threading.Thread(target=work, args=pair) for pair in (("a", first), ("b", second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.loads() == before + 1 and len(found["a"]) == len(found["b"]) == K * len(PROMPTS)


REFUSED = {
    "another mode": ({"model_config": {"logprobs_mode": "raw_logprobs"}}, "want processed_logprobs.*--logprobs-mode"),
    "processors": ({"model_config": {"logits_processors": ["mine"]}}, r"logits_processors \['mine'\], want none"),
    "short texts": ({"model_config": {"max_model_len": 17}}, "max_model_len 17, want at least 18"),
    "a tied head on a CPU": ({"device_config": {"device": "cpu"}}, "--hf-overrides '{\"tie_word_embeddings\": false}'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_servers_that_are_refused_at_the_start(start, tmp_path, name):
    config, text = REFUSED[name]
    with pytest.raises(ValueError, match=f"vllm_server: .*{text}"):
        engine_of(tmp_path, start(), start(**config)).check(make_model(tie=True), 18)


def test_a_server_of_another_model_is_refused(start, policy, tmp_path):
    server = start()
    policy.resize_token_embeddings(V + 1, mean_resizing=False)
    with pytest.raises(ValueError, match=r"Token id 13 is out of vocabulary; it is asked for token 13, .*same model"):
        engine_of(tmp_path, server).check(policy, 18)


def test_servers_that_do_not_answer_are_refused(start, policy, tmp_path):
    server = start()
    server.stop()
    with pytest.raises(ValueError, match=r"vllm_server: .*ConnectionRefusedError.*is it running\?"):
        engine_of(tmp_path, server)
    server.start()
    server.server_info = lambda body: (404, {"detail": "Not Found"})
    with pytest.raises(ValueError, match="start it with VLLM_SERVER_DEV_MODE=1"):
        engine_of(tmp_path, server)
    with pytest.raises(ValueError, match=r"vllm_server: got http.*/v1, want the server's own address, without /v1"):
        VllmServers([f"{server.url}/v1"], timeout=1, weights=None)
    server.server_info = lambda body: (200, {"something": "else"})
    with pytest.raises(ValueError, match="does not answer as vLLM"):
        engine_of(tmp_path, server)
    del server.server_info
    server.inference_v1_generate = lambda body: (403, {"error": {"message": "Scale-out endpoints are disabled."}})
    with pytest.raises(ValueError, match=r"endpoints are disabled\.; start it with --enable-scale-out"):
        engine_of(tmp_path, server).check(policy, 18)
    with pytest.raises(ValueError, match="want each server once"):
        engine_of(tmp_path, server, server)


def test_the_tied_head_of_a_server_that_was_told_of_none(start, tmp_path):
    policy = make_model(tie=True)
    server = start(model_config={"hf_overrides": {"tie_word_embeddings": False}}, device_config={"device": "cpu"})
    assert not server.model.config.tie_word_embeddings
    assert gap(policy, draw(engine_of(tmp_path, server), policy)) < 1e-12


def test_a_temperature_that_vllm_would_raise(start, policy, tmp_path):
    with pytest.raises(ValueError, match=r"temperature: got 0\.005, want at least 0\.01 with rollout_engine vllm"):
        draw(engine_of(tmp_path, start()), policy, temperature=0.005)


class TestAdapters:
    """LoRA adapters, loaded as such; the fake server merges them."""

    @pytest.fixture
    def adapted(self, policy):
        peft = pytest.importorskip("peft", reason="needs the package peft")
        base = copy.deepcopy(policy)
        model = peft.get_peft_model(policy, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data.normal_(std=0.5)
        return base, model.eval()

    def serve(self, start, base, **config):
        import peft

        server = start(lora_config={"max_lora_rank": 8, **config})
        server.first = {name: x.clone() for name, x in base.state_dict().items()}
        server.restart()
        choice = server.choice

        def merged(prompt, params, k):
            plain, folder = server.model, server.adapters[server.asked[-1][2]["model"]]
            server.model = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).merge_and_unload()
            try:
                return choice(prompt, params, k)
            finally:
                server.model = plain

        server.choice = lambda prompt, params, k: (
            merged(prompt, params, k) if server.asked[-1][2]["model"] in server.adapters else choice(prompt, params, k)
        )
        return server

    def test_they_are_what_samples(self, start, adapted, tmp_path, monkeypatch):
        base, policy = adapted
        server = self.serve(start, base)
        monkeypatch.setattr(vllm_servers, "MOST_CONNECTIONS", 1)
        engine = engine_of(tmp_path, server)
        for _ in range(2):
            assert gap(policy, draw(engine, policy)) < 1e-9
            assert list(server.adapters) == [engine.version.name] and server.loads() == 0
            assert not list((tmp_path / "weights").rglob("model.safetensors"))
        engine.update_weights = lambda policy: None
        server.restart()
        assert gap(policy, draw(engine, policy)) < 1e-9 and list(server.adapters) == [engine.version.name]

    def test_they_are_merged_where_a_server_takes_none(self, start, adapted, tmp_path):
        base, policy = adapted
        servers = [self.serve(start, base), start()]
        assert gap(policy, draw(engine_of(tmp_path, *servers), policy)) < 1e-9
        assert [server.loads() for server in servers] == [1, 1] and not servers[0].adapters

    def test_a_server_whose_first_weights_are_gone(self, start, adapted, tmp_path):
        base, policy = adapted
        server = self.serve(start, base)
        server.version = "rlhf-other-3"
        with pytest.raises(ValueError, match=r"has loaded other weights \(rlhf-other-3\) since its start"):
            engine_of(tmp_path, server).check(policy, 18)

    def test_a_rank_that_a_server_does_not_take(self, start, adapted, tmp_path):
        base, policy = adapted
        with pytest.raises(ValueError, match="max_lora_rank 2, want at least 4"):
            engine_of(tmp_path, self.serve(start, base, max_lora_rank=2)).check(policy, 18)


def test_settings_that_do_not_go_together(tmp_path):
    for options, text in (
        ({"vllm_server": ["http://h:1"]}, r"vllm_server: got \['http://h:1'\] with rollout_engine builtin, want none"),
        ({"rollout_engine": "vllm", "vllm_server": ["http://h:1"], "vllm_options": ["a=1"]}, "vllm_options: got some"),
        ({"rollout_engine": "vllm", "vllm_timeout": 0}, "vllm_timeout: got 0"),
    ):
        with pytest.raises(ValueError, match=text):
            PPOConfig(**options)
    config = PPOConfig(rollout_engine="vllm", vllm_server=["localhost:8000"], output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="vllm_server: got 'localhost:8000', want http://host:port"):
        load_engine("vllm", settings=config)


def test_without_vllm(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="rollout_engine: got vllm, which is not installed"):
        load_engine("vllm", settings=PPOConfig(rollout_engine="vllm", output_dir=str(tmp_path)))


def test_options_of_vllm_in_the_process():
    assert named_values(["a=0.4", "b=auto", "c={x: 1}", "d=true"]) == {"a": 0.4, "b": "auto", "c": {"x": 1}, "d": True}
    for text in ("a", "=1", "a b=1"):
        with pytest.raises(ValueError, match=r"vllm_options: got .*, want name=value"):
            named_values([text])


def test_the_package_is_no_requirement():
    text = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text()
    assert "vllm" not in text
