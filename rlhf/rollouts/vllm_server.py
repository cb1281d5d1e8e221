"""A vLLM server that the user has started, as the rollout engine sees it.

It is told which weights to load and under which name, and says with every response under which it was made. So one
that was started again, and has its first weights, is found out, and given the right ones. docs/rollouts.md says how to
start it.
"""

import contextlib
import functools
import os
import secrets
import threading
import time

from ..servers import JsonClient, Refused, ServerError, Unreachable
from .sampling import Completion, RolloutError
from .vllm_answers import LOGPROBS_MODE, WRONG_MODE, checked, parameters
from .vllm_weights import Version

POLL_SECONDS = 1.0
UNTIED = '{"tie_word_embeddings": false}'
CHECK_SECONDS = 10.0  # for an answer that takes no work


class Stale(Exception):
    """A response was made with other weights than the current ones, or thrown away while a server got new ones."""


class VllmServer:
    """A server: its address, what it has said of itself, and its weights."""

    def __init__(self, url: str, timeout: float):
        if url.rstrip("/").endswith("/v1"):
            raise ValueError(f"vllm_server: got {url}, want the server's own address, without /v1")
        self.client = JsonClient("vllm_server", url, timeout=timeout, token=os.environ.get("VLLM_API_KEY"))
        self.timeout, self.loading = timeout, threading.Lock()
        self.up, self.lost = True, None  # whether it answered last; why it is waited for no longer
        self.told, self.told_since = "", 0.0

    @property
    def url(self) -> str:
        return self.client.url

    def look(self) -> None:
        """Ask the server what it serves, and how.

        Raises:
            ValueError: it does not answer, was started without what the engine needs, or is no vLLM server.
        """
        try:
            cards = self.client.get("/v1/models")["data"]
            self.name = next(card["id"] for card in cards if not card.get("parent"))
            config = self.client.ask("GET", "/server_info", params={"config_format": "json"})["vllm_config"]
            model, lora = config["model_config"], config["lora_config"]
            self.max_model_len, self.max_num_seqs = model["max_model_len"], config["scheduler_config"]["max_num_seqs"]
            self.max_lora_rank = lora["max_lora_rank"] if lora else 0
            mode, bent = model["logprobs_mode"], model["logits_processors"]
            self.on_cpu = config["device_config"]["device"] == "cpu"
            self.untied = (model["hf_overrides"] or {}).get("tie_word_embeddings") is False
        except Refused as error:
            found = error.status == 404 and "/server_info" in str(error)
            hint = "; start it with VLLM_SERVER_DEV_MODE=1" if found else ""
            raise ValueError(f"{error}{hint}") from error
        except ServerError as error:
            raise ValueError(f"{error}; is it running?") from error
        except (KeyError, TypeError, StopIteration) as error:
            raise ValueError(f"vllm_server: {self.url} does not answer as vLLM 0.32 does ({error!r})") from error
        if mode != LOGPROBS_MODE:
            raise ValueError(
                f"vllm_server: {self.url}: {WRONG_MODE.format(mode)}; start it with --logprobs-mode {LOGPROBS_MODE}"
            )
        if bent:
            raise ValueError(f"vllm_server: {self.url} has logits_processors {bent}, want none")

    def check(self, size: int, tokens: int, rank: int | None, *, tied: bool) -> None:
        """Raise ValueError where it cannot serve the policy: ids below `size`, texts of `tokens`, adapters of `rank`.

        Args:
            rank: of LoRA adapters that are loaded as such; None: there are none.
            tied: the policy's head is its embedding, and not with adapters alone to be loaded.
        """
        if tied and self.on_cpu and not self.untied:
            raise ValueError(
                f"vllm_server: {self.url} runs on a CPU, where vLLM keeps a copy of a head that is tied to the "
                f"embedding, and would go on with the old one; start it with --hf-overrides '{UNTIED}'"
            )
        if self.max_model_len < tokens:
            raise ValueError(
                f"vllm_server: {self.url} has max_model_len {self.max_model_len}, want at least {tokens}: the longest "
                "prompt and response_length"
            )
        if rank is not None and self.max_lora_rank < rank:
            raise ValueError(f"vllm_server: {self.url} has max_lora_rank {self.max_lora_rank}, want at least {rank}")
        if rank is not None and (told := self.client.get("/weight_info")["weight_version"]) != "default":
            raise ValueError(
                f"vllm_server: {self.url} has loaded other weights ({told}) since its start, want its first ones under "
                "adapters; start it again"
            )
        ask = parameters(samples=1, response_length=1, temperature=1.0, stop_token_ids=[], seed=0)
        try:
            self.client.post("/resume")
            self._generate([size - 1], ask, self.name)
        except Refused as error:
            hint = "; start it with --enable-scale-out" if error.status in (403, 404) else ""
            hint = hint or f"; it is asked for token {size - 1}, the policy's last: does it serve the same model?"
            raise ValueError(f"{error}{hint}") from error
        except ServerError as error:
            raise ValueError(str(error)) from error

    def _generate(self, prompt_ids, params: dict, model: str) -> dict:
        body = {"token_ids": prompt_ids, "sampling_params": params, "model": model, "return_token_ids": True}
        return self.client.post("/inference/v1/generate", body, attempts=1)

    def sample(self, prompt: int, prompt_ids, params: dict, version: Version, size: int | None) -> list[Completion]:
        """The K completions of a prompt.

        Raises:
            Unreachable: no answer, or the server's own fault.
            Stale: the answer was made with other weights, or broken off.
            RolloutError, Refused: it is no answer to what was asked.
        """
        try:
            answer = self._generate(prompt_ids, params, version.name if version.adapters else self.name)
        except Refused as error:
            if version.adapters and error.status == 404:  # started again, it knows no adapter
                raise Stale(str(error)) from error
            raise
        try:
            return [self._completion(choice, answer, prompt, params, version, size) for choice in answer["choices"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise RolloutError(f"vllm_server: {self.url} does not answer as vLLM 0.32 does ({error!r})") from error

    def _completion(self, choice, answer, prompt, params, version, size) -> Completion:
        if choice["finish_reason"] == "abort":
            raise Stale(f"vllm_server: {self.url} broke a response off")
        ids, told = choice["token_ids"], choice["logprobs"]["content"]
        spans = [{"version": answer["model"]}] if version.adapters else choice["weight_versions"]
        made_with = {span["version"] for span in spans}
        if made_with != {version.name}:
            raise Stale(f"vllm_server: {self.url} sampled with weights {sorted(made_with)}, want {version.name}")
        if [entry["token_id"] for entry in told] != ids:
            raise RolloutError(f"vllm_server: {self.url} gave log-probs of other tokens than those of its response")
        log_probs = [entry["logprob"] for entry in told]
        completion = Completion(prompt, choice["index"], answer["prompt_token_ids"], ids, log_probs=log_probs)
        return checked(completion, params, finish_reason=choice["finish_reason"], vocabulary=size)

    def bring(self, version: Version, deadline: float, wanted=lambda: True, *, alone: bool = True) -> None:
        """Have the server load these weights, if it has others; wait for one that does not answer.

        Args:
            deadline: until when, as time.monotonic() counts.
            wanted: asked after each failure; False ends the waiting.
            alone: no other process may be giving the server the same weights.
        Raises:
            Unreachable: it did not answer until then; it is `lost`.
            RolloutError: it answers, and cannot load the weights.
        """
        with self.loading:
            while self.lost is None:
                try:
                    if self._has(version) or (self._may_load(version, alone) and self._load(version)):
                        self.up = True
                        return
                    error = Unreachable(f"vllm_server: {self.url} is loading weights")
                except Unreachable as failure:
                    error = failure
                    self._refuse_if_healthy(error, version)
                except Refused as refusal:
                    raise RolloutError(f"{refusal}; loading the policy's weights from {version.folder}") from refusal
                if not wanted():
                    raise error
                if time.monotonic() > deadline:
                    self.lost = f"{error}; given up after {self.timeout:g} s (vllm_timeout)"
                else:
                    time.sleep(POLL_SECONDS)
            raise Unreachable(self.lost)

    def _refuse_if_healthy(self, error: Unreachable, version: Version) -> None:
        """Raise RolloutError for a server that is well and fails nevertheless."""
        if error.status is None or error.status == 503:
            return
        with contextlib.suppress(Unreachable):
            self.client.get("/health", timeout=CHECK_SECONDS, attempts=1)
            raise RolloutError(
                f"{error}; it cannot load the policy's weights: can it read {version.folder} (vllm_weights_dir)?"
            ) from error

    def _has(self, version: Version) -> bool:
        ask = functools.partial(self.client.get, timeout=min(CHECK_SECONDS, self.timeout), attempts=1)
        if version.adapters:
            return any(card.get("id") == version.name for card in ask("/v1/models")["data"])
        told = ask("/weight_info")["weight_version"]
        self.told, self.told_since = told, self.told_since if told == self.told else time.monotonic()
        return told == version.name

    def _may_load(self, version: Version, alone: bool) -> bool:
        """Whether it is this process that gives the server its weights: the last one to say so, where several want to.

        One that has said so and is gone is waited for no longer than half of `timeout`.
        """
        if version.adapters:
            return True
        loading = f"{version.name}-loading-"
        if self.told.startswith(loading) and time.monotonic() - self.told_since < self.timeout / 2:
            return False
        mine = loading + secrets.token_hex(4)
        self.client.post("/update_weight_version", {"new_version": mine})
        if not alone:
            time.sleep(POLL_SECONDS / 2)
        return self.client.get("/weight_info")["weight_version"] == mine

    def _load(self, version: Version) -> bool:
        ask = self.client.post
        if version.adapters:
            old = [card["id"] for card in self.client.get("/v1/models")["data"] if card.get("parent")]
            for name in (name for name in old if name.startswith("rlhf-")):
                ask("/v1/unload_lora_adapter", {"lora_name": name}, text=True)
            ask("/v1/load_lora_adapter", {"lora_name": version.name, "lora_path": version.folder}, text=True)
        else:
            ask("/pause")
            ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": version.folder}})
            if not ask("/reset_prefix_cache")["success"]:
                raise RolloutError(f"vllm_server: {self.url} did not reset its prefix cache")
            ask("/update_weight_version", {"new_version": version.name})
        ask("/resume")
        if not self._has(version):
            raise RolloutError(f"vllm_server: {self.url} was given weights {version.name}, and says it has others")
        return True
