"""Rollout engines beside the built-in sampler: transformers' `generate`, its continuous batching, and any of one's own.

All are told which distribution to draw from, and tell with which log-probs they drew. `log_prob_gap` compares these
with the trainer's, which is how a cut distribution, another temperature or old weights come to light.
"""

import contextlib
import functools
import re

import torch
from transformers import GenerationConfig, LogitsProcessor

from rlhf_kernels.integrations.transformers import first_position

from ..models import unwrapped
from ..own_code import load_named
from .decoding import PADDED, cache_name, chunks, left_padded, reads_positions, run, way_of
from .sampling import Completion, RolloutEngine, RolloutError

ENGINES = ("builtin", "generate", "generate_batch", "vllm")
DIVERGED = "the policy's logits hold NaN or only -inf: the model has diverged"


def load_engine(name: str, *, batch_size: int | None = None, settings=None) -> RolloutEngine | None:
    """Return the engine that `--rollout_engine` names; None stands for the built-in sampler.

    Args:
        name: builtin, generate, generate_batch, vllm, or path/to/file.py:name, a `RolloutEngine`; a class is called
            once, without arguments, and its object is the engine.
        batch_size: most rows at a time of `generate` and `generate_batch`; None = all.
        settings: a `PPOConfig`, of which vllm reads `output_dir` and what begins with `vllm_`.
    Raises:
        ValueError: no such engine, file or name in it; what it names cannot be called; vllm is not installed, or its
            servers do not answer, or were started otherwise than it needs.
    """
    if name == "builtin":
        return None
    if name == "vllm":
        from .vllm import load_vllm

        return load_vllm(settings)
    if name in ENGINES:
        return functools.partial({"generate": generate, "generate_batch": generate_batch}[name], batch_size=batch_size)
    engine = load_named("rollout_engine", name, ENGINES)
    engine = engine() if isinstance(engine, type) else engine
    if not callable(engine):
        raise ValueError(f"rollout_engine: got {name!r}, whose objects cannot be called")
    return engine


def padded_log_probs(engine_log_probs: list[list[float]], mask) -> torch.Tensor:
    """The log-probs that an engine gave, [B, T] float64 where the mask lies, 0 behind the end of a response."""
    padded = torch.zeros(mask.shape, dtype=torch.float64)
    for row, values in enumerate(engine_log_probs):
        padded[row, : len(values)] = torch.tensor(values, dtype=torch.float64)
    return padded.to(mask.device)


def log_prob_gap(engine_log_probs: list[list[float]], log_probs, mask) -> dict[str, float]:
    """Compare the log-probs that an engine gave with those of the trainer for the same tokens.

    Args:
        engine_log_probs: a list for each response, nats.
        log_probs, mask: [B, T], the trainer's, nats; bool, 1 = keep.
    Returns:
        `rollout/logprob_gap_mean` and `_max`, of |engine - trainer| a token; `rollout/logprob_bias`, the mean of
        engine - trainer; `rollout/ratio_mean` and `_max`, of exp(trainer - engine), which is 1 in the mean where the
        engine drew from the whole distribution; `rollout/upward`, the share of tokens that the engine held for likelier
        by more than 1e-3 nats, less that of the unlikelier ones.
    """
    gap = torch.where(mask, padded_log_probs(engine_log_probs, mask) - log_probs.double(), 0)
    ratio = torch.where(mask, torch.exp(-gap), 0)
    higher = (gap > 1e-3).sum() - (gap < -1e-3).sum()
    means = torch.stack([gap.abs().sum(), gap.sum(), ratio.sum(), higher.double()]) / mask.sum()
    largest = torch.stack([gap.abs().max(), ratio.max()])
    names = ("logprob_gap_mean", "logprob_bias", "ratio_mean", "upward", "logprob_gap_max", "ratio_max")
    return {f"rollout/{name}": x for name, x in zip(names, [*means.tolist(), *largest.tolist()], strict=True)}


def gap_complaint(gap: dict[str, float], limit: float | None) -> str | None:
    """Say what is wrong where the mean gap of `log_prob_gap` is beyond `limit` nats a token, and what may be why."""
    if limit is None or gap["rollout/logprob_gap_mean"] <= limit:
        return None
    reason = "as with weights that are not the policy's, another temperature or another dtype"
    if gap["rollout/upward"] > 0.5:
        reason = (
            "nearly always upwards, as with a distribution that was cut and renormalised (top_p, top_k, min_p) or a "
            "lower temperature"
        )
    return (
        f"the rollout engine's log-probs differ from the policy's by {gap['rollout/logprob_gap_mean']:.3g} nats a "
        f"token in the mean (at most {gap['rollout/logprob_gap_max']:.3g}; more than {limit:g} is too much), {reason}"
    )


@torch.no_grad()
def generate(
    model, tokenizer, prompt_ids, *, response_length, temperature, stop_token_ids, samples_per_prompt, seed,
    batch_size=None,
) -> list[Completion]:  # fmt: skip
    """transformers' `model.generate`, from the whole distribution; the prompt is computed once for its K responses."""
    inner, completions, stop = unwrapped(model), [], set(stop_token_ids)
    step = max(1, (batch_size or len(prompt_ids) * samples_per_prompt) // samples_per_prompt)
    with _sampling(inner, seed) as settings:
        way = way_of(inner)
        if not way.cached:
            raise _unfit("generate", inner, "it keeps no cache that generate can go on from", "builtin")
        config = GenerationConfig(**settings, temperature=1.0, max_new_tokens=response_length, **_ends(stop))
        for chosen in chunks(prompt_ids, step, one_length=way != PADDED):
            recorder = _Recorder(temperature)
            inputs = _inputs(inner, way, [prompt_ids[prompt] for prompt in chosen], samples_per_prompt)
            given, width = inputs["input_ids"], inputs["input_ids"].shape[1]
            sequences = inner.generate(**inputs, generation_config=config, logits_processor=[recorder])
            if not torch.equal(sequences[:, :width], given):
                raise RolloutError(f"generate returned {len(sequences)} rows for {len(given)}, or others than given")
            rows = zip(sequences[:, width:].tolist(), recorder.log_probs(sequences).tolist(), strict=True)
            for row, (ids, log_probs) in enumerate(rows):
                prompt, number = chosen[row // samples_per_prompt], row % samples_per_prompt
                end = next((t + 1 for t, token in enumerate(ids) if token in stop), len(ids))
                completions.append(
                    Completion(prompt, number, list(prompt_ids[prompt]), ids[:end], log_probs=log_probs[:end])
                )
    return completions


@torch.no_grad()
def generate_batch(
    model, tokenizer, prompt_ids, *, response_length, temperature, stop_token_ids, samples_per_prompt, seed,
    batch_size=None,
) -> list[Completion]:  # fmt: skip
    """transformers' continuous batching, from the whole distribution: a row that ends makes room for the next.

    The K requests of a prompt share its cache. Made for GPUs with flash attention; without it, each step computes
    the attention of all running rows to one another's tokens and masks them. Its thread starts while requests are still
    coming in, so that the samples of a seed need not be the same twice, and a run need not resume to the bit.
    """
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    inner, wanted = unwrapped(model), len(prompt_ids) * samples_per_prompt
    rows = min(wanted, batch_size or wanted)
    options = {"return_logprobs": True, "seed": seed, "max_requests_per_batch": rows}
    if inner.device.type == "cpu":  # where the size of the cache would be taken from the memory of the machine
        longest = max(map(len, prompt_ids)) + response_length
        options |= {"page_size": 16, "num_blocks": rows * (longest // 16 + 2), "max_batch_tokens": max(longest, rows)}
    with _sampling(inner, seed) as settings, _plain_attention(inner):
        if not reads_positions(inner):
            reason = (
                "continuous batching puts texts behind each other in a row, where its layers do not keep them apart"
            )
            raise _unfit(
                "generate_batch", inner, reason, "builtin" if not way_of(inner).cached else "builtin or generate"
            )
        config = GenerationConfig(
            **settings, temperature=temperature, max_new_tokens=response_length,
            num_return_sequences=samples_per_prompt, **_ends(stop_token_ids or [-1]),
        )  # fmt: skip
        results = inner.generate_batch(
            [list(ids) for ids in prompt_ids], generation_config=config, progress_bar=False,
            continuous_batching_config=ContinuousBatchingConfig(**options),
        )  # fmt: skip
    return [_completion(name, result) for name, result in results.items()]


def _completion(name: str, result) -> Completion:
    """Read a request of continuous batching: `req_P` is one sample of prompt P, `req_P__child#C` are the others."""
    found = re.fullmatch(r"req_(\d+)(?:__child#(\d+))?", name)
    if found is None:
        raise RolloutError(f"generate_batch returned a request named {name!r}, which was not asked for")
    error = result.error or (None if result.is_finished() else "it was not finished")
    sample = 0 if found[2] is None else int(found[2]) + 1
    return Completion(
        int(found[1]), sample, list(result.prompt_ids), list(result.generated_tokens), error, list(result.logprobs)
    )


def _unfit(engine: str, model, reason: str, others: str) -> ValueError:
    return ValueError(f"rollout_engine: got {engine} for {type(model).__name__}, but {reason}; use {others}")


def _ends(stop_token_ids) -> dict:
    return {"eos_token_id": sorted(stop_token_ids) or None, "pad_token_id": 0}


@contextlib.contextmanager
def _sampling(model, seed: int):
    """Eval mode, a seed, and no settings of the model's own; gives those that leave the distribution whole."""
    own, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()  # generate() takes what it is not told from there
    model.eval()
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield {"do_sample": True, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "num_beams": 1}
    finally:
        model.generation_config = own
        model.train(training)


@contextlib.contextmanager
def _plain_attention(model):
    """SDPA in the place of an attention that continuous batching does not know."""
    own = model.config._attn_implementation
    if own == "rlhf_shared_prefix":
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if model.config._attn_implementation != own:
            model.set_attn_implementation(own)


class _Recorder(LogitsProcessor):
    """Divides the logits by the temperature, last of all processors, and notes the log-probs of what is drawn."""

    def __init__(self, temperature: float):
        self.temperature, self.scores, self.steps = temperature, None, []

    def __call__(self, input_ids, scores):
        self._note(input_ids)
        self.scores = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        if self.scores.isnan().any():
            raise RolloutError(DIVERGED)
        return self.scores

    def _note(self, input_ids):
        if self.scores is not None:
            self.steps.append(self.scores.gather(-1, input_ids[:, -1:]))

    def log_probs(self, sequences) -> torch.Tensor:
        """[B, steps] of the tokens drawn; what stands behind a stop token means nothing."""
        self._note(sequences)
        return torch.cat(self.steps, dim=-1)


def _inputs(model, way, prompts, samples_per_prompt) -> dict:
    """Inputs of `generate`: each prompt K times, with the keys and values of all but its last token, made once."""
    inputs = left_padded(model, prompts)
    ids, rows = (
        inputs["input_ids"],
        torch.arange(len(prompts), device=model.device).repeat_interleave(samples_per_prompt),
    )
    cache = {}
    if samples_per_prompt > 1 and ids.shape[1] > 1 and way == PADDED:
        before = {name: inputs[name][:, :-1] for name in ("attention_mask", "position_ids")}
        _, made = run(model, way, ids[:, :-1], before)
        made.reorder_cache(rows)
        cache = {cache_name(unwrapped(model)): made}
    if not first_position(model):
        del inputs["position_ids"]  # generate makes the same
    return {name: tensor[rows] for name, tensor in inputs.items()} | cache
