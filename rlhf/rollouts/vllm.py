"""vLLM as a rollout engine: `vllm.LLM` in this process (`VllmInProcess`), or servers (vllm_servers.py)."""

import importlib.util
import os
from pathlib import Path

import torch
import yaml

from .sampling import Completion, RolloutError
from .vllm_answers import LOGPROBS_MODE, WRONG_MODE, checked, parameters, seed_of
from .vllm_weights import WeightFolders, is_tied, on_first, vocabulary


def load_vllm(settings):
    """The engine that a run's settings ask for.

    Raises:
        ValueError: vllm is not installed; an option is none; a server does not answer, or not as it should.
    """
    if settings is None:
        raise ValueError("rollout_engine: got vllm without the settings that it needs (load_engine's settings)")
    home = settings.vllm_weights_dir or os.path.join(settings.output_dir, "rollout_weights")
    weights = WeightFolders(home, own=settings.vllm_weights_dir is None)
    if settings.vllm_server is not None:
        from .vllm_servers import VllmServers

        return VllmServers(settings.vllm_server, timeout=settings.vllm_timeout, weights=weights)
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "rollout_engine: got vllm, which is not installed (pip install vllm); without it vllm_server names servers "
            "that run elsewhere"
        )
    return VllmInProcess(weights, dtype=settings.dtype, options=named_values(settings.vllm_options))


def named_values(options: list[str] | None) -> dict:
    """{name: value} of texts `name=value`, each value as YAML reads it."""
    found = {}
    for text in options or ():
        name, sign, value = text.partition("=")
        if not (name.isidentifier() and sign):
            raise ValueError(f"vllm_options: got {text!r}, want name=value, an argument of vllm.LLM")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"vllm_options: got {text!r}, whose value is no YAML") from error
    return found


class VllmInProcess:
    """`vllm.LLM`, made from the policy's weights when they first come, and given new ones before each rollout.

    Each process has its own. `update_weights` is called by all processes together.

    Args:
        dtype: what vLLM computes in.
        options: further arguments of `vllm.LLM`.
    """

    reads_slices = True

    def __init__(self, weights: WeightFolders, *, dtype: str, options: dict):
        fixed = {"logprobs_mode": LOGPROBS_MODE, "generation_config": "vllm", "skip_tokenizer_init": True}
        for name in options.keys() & {*fixed, "model", "tokenizer", "logits_processors"}:
            raise ValueError(f"vllm_options: got {name}, which the engine sets itself")
        self.weights, self.llm, self.tokens, self.vocabulary = weights, None, None, None
        self.options = {"dtype": dtype, **options, **fixed}

    def check(self, policy, tokens: int) -> None:
        """Note what the policy's texts need: up to `tokens` tokens."""
        self.tokens, self.vocabulary = tokens, vocabulary(policy)

    def update_weights(self, policy) -> None:
        """Give vLLM the policy's weights, and start it if it does not run yet.

        Raises:
            ValueError: vLLM does not start with this model and these options.
            RolloutError: it has other weights afterwards.
        """
        if self.vocabulary is None:
            self.check(policy, None)
        untied = (
            is_tied(policy) and not torch.accelerator.is_available()
        )  # on a CPU vLLM would go on with the copy of a tied head that it has made
        version = self.weights.write(policy, untied=untied)
        if self.llm is None:
            self._start(version.folder, {"hf_overrides": {"tie_word_embeddings": False}} if untied else {})
        else:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": version.folder})
            if not self.llm.reset_prefix_cache():
                raise RolloutError("rollout_engine: vLLM did not reset its prefix cache")
        self.llm.update_weight_version(version.name)
        self.version = version.name
        on_first(lambda: self.weights.keep_only(version))

    def _start(self, folder: str, options: dict) -> None:
        from vllm import LLM

        try:
            self.llm = LLM(model=str(Path(folder)), **{"max_model_len": self.tokens, **options, **self.options})
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            raise ValueError(f"rollout_engine: vLLM does not start: {' '.join(str(error).split())[:500]}") from error
        mode = self.llm.llm_engine.vllm_config.model_config.logprobs_mode
        if mode != LOGPROBS_MODE:
            raise ValueError(WRONG_MODE.format(mode))

    def __call__(
        self, model, tokenizer, prompt_ids, *, response_length, temperature, stop_token_ids, samples_per_prompt, seed
    ):
        """See `RolloutEngine`; of sample k of prompt p the seed is `seed_of(seed, p) + k`."""
        from vllm import SamplingParams

        asked = [
            parameters(
                samples=samples_per_prompt, response_length=response_length, temperature=temperature,
                stop_token_ids=stop_token_ids, seed=seed_of(seed, prompt),
            ) for prompt in range(len(prompt_ids))
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        answers = self.llm.generate(prompts, [SamplingParams(**params) for params in asked], use_tqdm=False)
        if len(answers) != len(prompts):
            raise RolloutError(f"vLLM gave {len(answers)} answers to {len(prompts)} prompts")
        return [
            self._completion(output, answer, prompt, params)
            for prompt, (answer, params) in enumerate(zip(answers, asked, strict=True))
            for output in answer.outputs
        ]

    def _completion(self, output, answer, prompt: int, params: dict) -> Completion:
        made_with = {span.version for span in output.weight_versions or ()}
        if made_with != {self.version}:
            raise RolloutError(f"rollout_engine: vLLM sampled with weights {sorted(made_with)}, want {self.version}")
        ids = list(output.token_ids)
        log_probs = [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)]
        completion = Completion(prompt, output.index, list(answer.prompt_token_ids), ids, log_probs=log_probs)
        return checked(completion, params, finish_reason=output.finish_reason, vocabulary=self.vocabulary)
