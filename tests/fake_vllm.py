"""A server that speaks as much of vLLM 0.32's HTTP as the rollout engine asks for, and errs as a test says.

It samples from a real model, with a loop of its own, and has the weights that it was told to load.
"""

import threading

import torch
from safetensors.torch import load_file

from tests.fake_server import Fake

CONFIG = {
    "model_config": {
        "max_model_len": 32, "logprobs_mode": "processed_logprobs", "logits_processors": None, "hf_overrides": {},
    },
    "scheduler_config": {"max_num_seqs": 16}, "lora_config": None, "device_config": {"device": "cuda"},
}  # fmt: skip


class FakeVllm(Fake):
    """
    Args:
        model: what it serves, weights as it was started with; it changes them in place.
        fault: called with a body of a request for samples and its answer, gives what is sent instead; it may raise
            `Died`, or return (status, content).
        config: what differs from `CONFIG`, by section.
    """

    def __init__(self, model, fault=lambda body, answer: answer, **config):
        self.model, self.first = model, {name: x.clone() for name, x in model.state_dict().items()}
        self.config = {
            name: {**(part or {}), **config[name]} if name in config else part for name, part in CONFIG.items()
        }
        self.fault, self.working, self.adapter = fault, threading.Lock(), None
        self.restart()
        super().__init__(self.reply)

    def restart(self):
        """Be as if newly started: first weights, no adapters, no version."""
        self.model.load_state_dict(self.first)
        self.version, self.adapters, self.paused, self.cache_is_clean = "default", {}, False, True

    def loads(self) -> int:
        return sum(path == "/collective_rpc" for _, path, _ in self.asked)

    def reply(self, method, path, body):
        path = path.partition("?")[0]
        with self.working:
            return getattr(self, path.strip("/").replace("/", "_"))(body)

    def health(self, body):
        return 200, None

    def v1_models(self, body):
        cards = [{"id": "base", "parent": None}] + [{"id": name, "parent": "base"} for name in self.adapters]
        return 200, {"data": cards}

    def server_info(self, body):
        return 200, {"vllm_config": self.config}

    def weight_info(self, body):
        return 200, {"weight_version": self.version}

    def update_weight_version(self, body):
        self.version = body["new_version"]
        return 200, {"success": True}

    def pause(self, body):
        self.paused = True
        return 200, {"status": "paused"}

    def resume(self, body):
        self.paused = False
        return 200, {"status": "resumed"}

    def reset_prefix_cache(self, body):
        self.cache_is_clean = True
        return 200, {"success": True}

    def collective_rpc(self, body):
        assert body["method"] == "reload_weights" and self.paused
        try:
            state = load_file(f"{body['kwargs']['weights_path']}/model.safetensors")
        except OSError as error:
            return 500, {"error": {"message": f"Call to collective_rpc method failed: {error}"}}
        missing = self.model.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys and set(missing.missing_keys) <= set(self.model.all_tied_weights_keys)
        self.cache_is_clean = False
        return 200, {"results": [None]}

    def v1_load_lora_adapter(self, body):
        self.adapters[body["lora_name"]] = body["lora_path"]
        return 200, b"Success"

    def v1_unload_lora_adapter(self, body):
        del self.adapters[body["lora_name"]]
        return 200, b"Success"

    def inference_v1_generate(self, body):
        prompt, params = body["token_ids"], body["sampling_params"]
        if body["model"] not in ("base", *self.adapters):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if max(prompt) >= self.model.config.vocab_size:
            return 400, {"error": {"message": f"Token id {max(prompt)} is out of vocabulary"}}
        assert not self.paused and self.cache_is_clean
        choices = [self.choice(prompt, params, k) for k in range(params["n"])]
        answer = {"model": body["model"], "prompt_token_ids": prompt, "choices": choices}
        answer = self.fault(body, answer)
        return answer if isinstance(answer, tuple) else (200, answer)

    @torch.no_grad()
    def choice(self, prompt, params, k):
        draw, ids, log_probs = torch.Generator().manual_seed(params["seed"] + k), [], []
        room = self.config["model_config"]["max_model_len"] - len(prompt)
        while len(ids) < min(params["max_tokens"], room) and not (ids and ids[-1] in params["stop_token_ids"]):
            logits = self.model(torch.tensor([prompt + ids])).logits[0, -1].double() / params["temperature"]
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=draw))
            log_probs.append(float(logits.log_softmax(-1)[token]))
            ids.append(token)
        content = [{"token_id": token, "logprob": x} for token, x in zip(ids, log_probs, strict=True)]
        spans = [{"version": self.version, "start": 0, "end": len(ids)}]
        stopped = bool(ids) and ids[-1] in params["stop_token_ids"]
        return {
            "index": k, "finish_reason": "stop" if stopped else "length", "token_ids": ids,
            "logprobs": {"content": content}, "weight_versions": spans,
        }  # fmt: skip
