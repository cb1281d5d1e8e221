"""PPO on a server that speaks vLLM's HTTP: processes, sharded weights, adapters, restarts, a run that is resumed."""

import json
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.ppo import run as ppo_run
from rlhf.rollouts import vllm_server
from tests.fake_vllm import FakeVllm
from tests.tiny_ppo import TIMINGS, forked

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
EXACT = 1e-6  # nats a token between the server's log-probs and the trainer's, both in float64 up to fp32 sums
LORA = {"use_peft": True, "lora_r": 2, "lora_alpha": 4}


@pytest.fixture
def serve(request, home, monkeypatch):
    """Starts a server of one of the shared policies."""
    monkeypatch.setattr(vllm_server, "POLL_SECONDS", 0.02)

    def serve(kind="llama", *arguments, **config):
        model = AutoModelForCausalLM.from_pretrained(home.path / kind, dtype=torch.float64).eval()
        config = {"model_config": {"max_model_len": 48, "hf_overrides": {}}} | config
        server = FakeVllm(model, *arguments, **config)
        request.addfinalizer(server.stop)
        return server

    return serve


def settings(server, **options):
    return {
        "rollout_engine": "vllm", "vllm_server": [server.url], "dtype": "float64", "rollout_gap_limit": EXACT,
        "rollout_gap_warning": None, "num_responses": 2, "temperature": 0.8, **options,
    }  # fmt: skip


def assert_right(home, out, steps):
    """All iterations were sampled with the weights of their time, which moved."""
    rows = home.rows(out)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(row["rollout/logprob_gap_max"] < 8 * EXACT for row in rows)
    assert max(abs(row["objective/kl"]) for row in rows[1:]) > 100 * EXACT
    return [{name: row[name] for name in row if name not in TIMINGS} for row in rows]


def test_a_server_that_is_started_again_changes_nothing(home, serve):
    server = serve()
    home.trainer("calm", **settings(server, max_steps=3)).train()
    calm = assert_right(home, "calm", 3)
    assert len(list((home.path / "calm" / "rollout_weights").iterdir())) == 1

    def restart(body, answer):
        nonlocal count
        count += 1
        if count % 7 == 0:
            server.restart()
            return 500, {"error": {"message": "EngineDeadError"}}
        return answer

    server.restart()
    count, server.fault = 0, restart
    home.trainer("restarts", **settings(server, max_steps=3)).train()
    assert count >= 14 and assert_right(home, "restarts", 3) == calm


def test_a_run_goes_on_with_another_server(home, serve):
    first, second = serve(), serve()
    home.trainer("whole", **settings(first, max_steps=3)).train()
    home.trainer("parts", **settings(first, max_steps=2, save_steps=2)).train()
    home.trainer("parts", **settings(second, max_steps=3, save_steps=2, resume_from_checkpoint="true")).train()
    assert second.loads() == 1 and assert_right(home, "parts", 3) == assert_right(home, "whole", 3)


def test_samples_drawn_ahead(home, serve):
    """Those of iteration 2 come from the weights of the start, as the gap to the trainer's log-probs shows."""
    server = serve()
    home.trainer("ahead", **settings(server, max_steps=3, rollout_ahead=1, rollout_correction="token")).train()
    rows = home.rows("ahead")
    assert [row["rollout/ahead"] for row in rows] == [0, 1, 1]
    assert rows[0]["rollout/logprob_gap_max"] < 8 * EXACT < 1e-4 < rows[1]["rollout/logprob_gap_max"]
    assert rows[0]["rollout/effective_sample_size"] == pytest.approx(1) != rows[1]["rollout/effective_sample_size"]
    assert server.loads() == 3  # at the check, and with the weights that the first two iterations began with


def test_servers_are_asked_before_anything_is_trained(home, serve, monkeypatch):
    monkeypatch.setattr(ppo_run, "check_contract", lambda run: pytest.fail("the run has begun"))
    with pytest.raises(ValueError, match="max_model_len 13, want at least 14"):
        home.trainer(**settings(serve(model_config={"max_model_len": 13})))
    server = serve()
    server.stop()
    monkeypatch.setattr(ppo_run, "load_networks", lambda run, resume: pytest.fail("models are loaded"))
    with pytest.raises(ValueError, match=r"vllm_server: .*is it running\?"):
        home.trainer(**settings(server))


@pytest.mark.slow
def test_processes_share_a_server(home, serve):
    """Two processes, sharded or not, a tied head and adapters that are merged; one load an iteration."""
    kinds = {"llama": {}, "gpt2": {"kind": "gpt2"}} | ({"lora": LORA} if find_spec("peft") else {})
    plan, servers = [], {}
    for name, options in kinds.items():
        for way, environment in (("ddp", {}), ("fsdp", SHARDED)):
            servers[f"{name}-{way}"] = server = serve("gpt2" if name == "gpt2" else "llama")
            config = home.config(f"{name}-{way}", **settings(server, max_steps=3, **options))
            plan.append({"options": vars(config), "ranks": 2, "environment": environment, "kills": 0, "seed": 0})
    forked(home, plan)
    for out, server in servers.items():
        assert_right(home, out, 3)
        assert server.loads() == 4, out  # the check at the start, then one for each rollout
        seen = [json.loads(line) for n in range(2) for line in (home.path / f"{out}-rollouts-{n}.jsonl").open()]
        assert len({json.dumps(row["responses"]) for row in seen}) == len(seen)
