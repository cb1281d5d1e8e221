"""The reward model of `--reward_server` on a vLLM server: the scores of the local one.

Wants vLLM, here or in the environment of the python that RLHF_KERNELS_VLLM_PYTHON names.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch

from rlhf import models
from rlhf.models.sequences import join, response_scores
from rlhf.ppo import PPOConfig, train_ppo
from rlhf.rewards.server import RewardServer
from rlhf.servers import JsonClient, Refused, ServerError

PYTHON = os.environ.get("RLHF_KERNELS_VLLM_PYTHON") or (sys.executable if find_spec("vllm") else None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="vllm is not installed, and RLHF_KERNELS_VLLM_PYTHON names no python"),
]
BIAS, STARTS = 0.75, 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model over the demo's policy, with a calibration."""
    path, tokenizer = tmp_path_factory.mktemp("reward"), models.load_tokenizer("demo")
    model = models.reward_model_from_policy("demo", 3, pad_token_id=tokenizer.pad_token_id)
    model.config.reward_bias = BIAS
    models.save_model(model, tokenizer, path)
    return path


@pytest.fixture(scope="module")
def server(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--runner", "pooling"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    log = folder.parent / "server.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_for(JsonClient("reward_server", f"http://127.0.0.1:{port}", timeout=5.0, attempts=1), process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(client, process, log):
    deadline = time.monotonic() + STARTS
    while True:
        try:
            return client.get("/health")
        except ServerError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1.0)


def rewards(url, bias=BIAS, **options):
    return RewardServer(JsonClient("reward_server", url, timeout=300.0), bias, **options)


def texts(vocabulary=2048, count=96):
    """Prompts and responses of any ids, pad and end tokens among them; one fills the context."""
    draw = random.Random(0)
    prompts = [[draw.randrange(vocabulary) for _ in range(draw.randint(1, 60))] for _ in range(count)]
    responses = [[draw.randrange(vocabulary) for _ in range(draw.randint(1, 60))] for _ in range(count)]
    prompts[1], responses[2][-1], responses[3][-1] = prompts[1] + [7] * (256 - len(prompts[1] + responses[1])), 0, 1
    return prompts, responses


def test_scores_are_those_of_the_local_model(folder, server):
    prompts, responses = texts()
    model = models.load_reward_model(folder).requires_grad_(False).eval()
    with torch.no_grad():
        local = response_scores(model, join(prompts, responses))
    joined = [a + b for a, b in zip(prompts, responses, strict=True)]
    served = torch.tensor(rewards(server, batch_size=7)(joined, ["row"] * len(joined)))
    assert local.std() > 0.1
    torch.testing.assert_close(served, local, rtol=0, atol=1e-5)


def test_what_the_server_says_of_itself(server, caplog):
    served = rewards(server)
    assert served.context == 256
    served.check([0])
    assert "probabilities" not in caplog.text
    raw, activated = (served._ask([[5, 6, 7]], ["row"], use_activation=on)[0] for on in (False, True))
    assert activated == pytest.approx(torch.tensor(raw).sigmoid().item(), abs=1e-6)
    with pytest.raises(Refused, match="256"):
        served([[5] * 257], ["row"])
    with pytest.raises(Refused, match="vocabulary"):
        served([[5, 2048]], ["row"])


def test_a_run(folder, server, tmp_path):
    """A PPO run's samples and scores, with the local model and with the server."""
    prompts = ["Ben and Sam were best friends.", "One day a cat ran.", "It was late.", "The dog sat."]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    found = []
    for name, changes in (("local", {}), ("served", {"reward_server": server})):
        train_ppo(PPOConfig(
            sft_model_path="demo", reward_model_path=str(folder), dataset_name=str(tmp_path / "prompts.jsonl"),
            output_dir=str(tmp_path / name), response_length=16, rollout_batch_size=4, per_device_train_batch_size=4,
            num_ppo_epochs=1, max_steps=2, save_steps=0, disable_tqdm=True, **changes,
        ))  # fmt: skip
        lines = (tmp_path / name / "samples.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines])
        assert json.loads((tmp_path / name / "run.json").read_text())["contract"]["value_at_end"] < 1e-5
    for a, b in zip(*found, strict=True):
        assert a | {"score": 0} == b | {"score": 0} and a["score"] == pytest.approx(b["score"], abs=1e-5)
