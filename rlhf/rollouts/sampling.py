"""Sampling from the policy: token ids in, token ids out.

Tokens are drawn from `softmax(logits / temperature)` over the whole vocabulary and nothing else: top_p, top_k,
min_length and every other processor of a model's generation_config are left out, since a log-prob of the renormalised
distribution is not the one that the loss differentiates. Each row has its own uniform numbers, given as `noise` or
drawn before the first step, so that a response depends neither on the batch size nor on the other rows (up to the
rounding of the logits). Other engines stand in engines.py, or anywhere else: see `RolloutEngine`.
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from .. import models
from ..errors import RunError
from ..models.sequences import per_token_log_probs
from .decoding import Texts, chunks, way_of

__all__ = ["Completion", "RolloutEngine", "RolloutError", "Rollouts", "collect", "per_token_log_probs", "sample"]

NEUTRAL_SAMPLING = {
    "top_k": (None, 0), "top_p": (None, 1.0), "min_p": (None, 0.0), "top_h": (None,), "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0), "min_length": (None, 0), "min_new_tokens": (None, 0),
    "repetition_penalty": (None, 1.0), "encoder_repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0), "bad_words_ids": (None,), "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []), "sequence_bias": (None,), "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,), "exponential_decay_length_penalty": (None,), "guidance_scale": (None, 1.0),
    "watermarking_config": (None,), "num_beams": (None, 1),
}  # fmt: skip
"""Settings of a generation_config that cut, bend or lengthen, with the values at which they do not."""


class RolloutError(RunError):
    """A rollout engine lost, renamed, repeated or broke a completion."""


@dataclass
class Rollouts:
    """Samples in the order of the prompts, `samples_per_prompt` after each other; ids include the stop token."""

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    ended: list[bool]
    log_probs: list[list[float]] | None = None  # of the response tokens, nats, as the engine computed them
    step_rewards: torch.Tensor | None = None  # [B, T] fp32 process rewards, which scoring fills in; None where none


@dataclass
class Completion:
    """What an engine returns for sample number `sample` of prompt number `prompt`, both counted from 0."""

    prompt: int
    sample: int
    prompt_ids: list[int]
    response_ids: list[int]  # up to and with the first stop token, or `response_length` of them
    error: str | None = None
    log_probs: list[float] | None = None  # of response_ids, nats, under the distribution that they were drawn from


class RolloutEngine(Protocol):
    """What samples the responses of PPO: `--rollout_engine`, where a file's function (or class) may be one.

    An engine draws every token from `softmax(logits / temperature)` of the policy over the whole vocabulary, without
    top_p, top_k, penalties or a least length, and ends a response behind the first of `stop_token_ids` or after
    `response_length` tokens. Prompts go in and responses come out as ids. It returns a `Completion` for each of the K
    samples of each prompt, in any order; one that is missing, repeated, unknown, failed or of another prompt stops the
    run. Four things are its own choice:

    - `Completion.log_probs`: where it gives those of the sampled tokens, for all completions, they are compared with
      the trainer's in each iteration (`rollout/logprob_gap_mean`, ...); `--rollout_correction` weighs the loss by
      them.
    - `engine.update_weights(policy)`: where it has this method, it is called before each rollout, on every process,
      with the policy as it is then: a model of transformers, or of PEFT around one. A server loads its weights there;
      of a policy that is sharded (FSDP2) from `named_parameters()`, since `state_dict()` gives slices.
    - `engine.reads_slices = True`: `update_weights` takes a policy whose weights FSDP2 has cut (DTensors), and gathers
      what it wants of them, on all processes alike; so no process ever holds the whole. One with adapters comes whole.
    - `engine.concurrent = True`: it samples elsewhere (in another process, on a server) from the weights that
      `update_weights` last gave it, and its call may run in a thread while `model` trains: it reads nothing of `model`
      but its config, calls no collective operation, and leaves torch's global generator alone. `--rollout_ahead 1`
      wants this. It is called once at a time, and gets no weights while a call runs.

    Samples should follow from `seed` alone, which differs from call to call and from process to process; a run resumes
    to the bit only if they do.

    Example:
        class Server:
            def update_weights(self, policy): ...
            def __call__(self, model, tokenizer, prompt_ids, *, response_length, temperature, stop_token_ids,
                         samples_per_prompt, seed):
                for prompt, ids in enumerate(prompt_ids):
                    for sample in range(samples_per_prompt):
                        tokens, log_probs = ...
                        yield Completion(prompt, sample, ids, tokens, log_probs=log_probs)
    """

    def __call__(
        self, model, tokenizer, prompt_ids: list[list[int]], *, response_length: int, temperature: float,
        stop_token_ids: list[int], samples_per_prompt: int, seed: int,
    ) -> Iterable[Completion]: ...  # fmt: skip


def ignored_sampling_settings(model) -> dict:
    """Return the settings of the model's generation_config that would change what is sampled, and are not applied."""
    config = getattr(model, "generation_config", None)
    settings = {name: getattr(config, name, None) for name in NEUTRAL_SAMPLING}
    return {name: value for name, value in settings.items() if value not in NEUTRAL_SAMPLING[name]}


def collect(prompt_ids, samples_per_prompt: int, completions: Iterable[Completion], stop_token_ids) -> Rollouts:
    """Put an engine's completions into the order of the prompts; every one must be there exactly once and unharmed.

    Raises:
        RolloutError: a completion is missing, unknown, repeated, failed, empty, of another prompt, or goes on after a
            stop token; some have log-probs and some not, or not one finite number for each token.
    """
    found = {}
    for completion in completions:
        key = (completion.prompt, completion.sample)
        if not (0 <= completion.prompt < len(prompt_ids) and 0 <= completion.sample < samples_per_prompt):
            raise RolloutError(f"the rollout engine returned {key} (prompt, sample), which was not asked for")
        if key in found:
            raise RolloutError(f"the rollout engine returned {key} (prompt, sample) twice")
        if completion.error:
            raise RolloutError(f"the rollout engine failed on {key} (prompt, sample): {completion.error}")
        if list(completion.prompt_ids) != list(prompt_ids[completion.prompt]):
            raise RolloutError(f"the rollout engine returned {key} (prompt, sample) with another prompt's ids")
        if not completion.response_ids or any(token in stop_token_ids for token in completion.response_ids[:-1]):
            raise RolloutError(f"the response of {key} (prompt, sample) is empty or goes on after a stop token")
        given = completion.log_probs
        if given is not None and not (len(given) == len(completion.response_ids) and all(map(math.isfinite, given))):
            raise RolloutError(f"{key} (prompt, sample) has no finite log-prob for each token of its response")
        found[key] = completion
    wanted = [(prompt, sample) for prompt in range(len(prompt_ids)) for sample in range(samples_per_prompt)]
    missing = [key for key in wanted if key not in found]
    if missing:
        raise RolloutError(
            f"the rollout engine returned {len(found)} of {len(wanted)} completions; missing (prompt, sample): "
            f"{missing[:5]}"
        )
    responses = [list(found[key].response_ids) for key in wanted]
    ended = [response[-1] in stop_token_ids for response in responses]
    with_log_probs = sum(found[key].log_probs is not None for key in wanted)
    if with_log_probs not in (0, len(wanted)):
        raise RolloutError(f"the rollout engine gave log-probs for {with_log_probs} of {len(wanted)} completions")
    log_probs = [list(found[key].log_probs) for key in wanted] if with_log_probs else None
    return Rollouts([list(prompt_ids[prompt]) for prompt, _ in wanted], responses, ended, log_probs)


def sample(
    model, tokenizer, prompt_ids: list[list[int]], *, response_length: int, temperature: float,
    stop_token_ids: list[int], samples_per_prompt: int = 1, batch_size: int | None = None,
    noise: torch.Tensor | None = None, engine: RolloutEngine | None = None, seed: int | None = None,
) -> Rollouts:  # fmt: skip
    """Sample responses from the whole distribution `softmax(logits / temperature)`.

    Args:
        model: a causal LM; put into eval mode while sampling.
        tokenizer: not read by the built-in engine; an engine may need it.
        prompt_ids: P lists of token ids, none empty.
        response_length: most tokens of a response, the stop token included.
        temperature: > 0; the logits are divided by it.
        stop_token_ids: a response ends with the first of these.
        samples_per_prompt: K; the prompt is computed once for its K responses.
        batch_size: most rows at a time of the built-in engine; None = all. Prompts of like length go together.
        noise: [P, K, response_length] float64 in [0, 1), the number that chooses each token of the built-in engine.
            None: drawn from torch's global CPU generator.
        engine: another engine than the built-in one; its `update_weights(model)` is called first, if it has one.
        seed: of another engine; None = drawn from torch's global CPU generator.
    Returns:
        `Rollouts` of P * K rows in the order of the prompts.
    Raises:
        ValueError: an argument is out of range, or prompt and response do not fit the model's context.
        RolloutError: the engine lost or broke a completion.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, want a number > 0 (greedy decoding is not sampling)")
    for name, value in (("response_length", response_length), ("samples_per_prompt", samples_per_prompt)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, want at least 1")
    if not all(prompt_ids):
        raise ValueError("prompt_ids: a prompt is empty; every prompt needs at least one token")
    shape = (len(prompt_ids), samples_per_prompt, response_length)
    if noise is not None and tuple(noise.shape) != shape:
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, want {shape} (prompts, samples, tokens)")
    context = models.context_length(model)
    longest = max(map(len, prompt_ids), default=0)
    if context and longest + response_length > context:
        raise ValueError(
            f"prompt_ids: the longest prompt has {longest} tokens; with response_length {response_length} it does not "
            f"fit the model's context of {context}{models.context_hint(model)}"
        )
    settings = {
        "response_length": response_length, "temperature": temperature, "stop_token_ids": list(stop_token_ids),
        "samples_per_prompt": samples_per_prompt,
    }  # fmt: skip
    if engine is None:
        completions = transformers_engine(model, tokenizer, prompt_ids, **settings, batch_size=batch_size, noise=noise)
    else:
        if hasattr(engine, "update_weights"):
            engine.update_weights(model)
        seed = int(torch.randint(2**31 - 1, ())) if seed is None else seed
        completions = engine(model, tokenizer, prompt_ids, **settings, seed=seed)
    return collect(prompt_ids, samples_per_prompt, completions, set(stop_token_ids))


@torch.no_grad()
def transformers_engine(
    model, tokenizer, prompt_ids, *, response_length, temperature, stop_token_ids, samples_per_prompt, batch_size,
    noise=None,
) -> list[Completion]:  # fmt: skip
    """The built-in engine: a plain loop over the model, with its cache where it has one that can be used."""
    if noise is None:
        noise = torch.rand(len(prompt_ids), samples_per_prompt, response_length, dtype=torch.float64)
    step = max(1, (batch_size or len(prompt_ids) * samples_per_prompt) // samples_per_prompt)
    stop, completions, training = set(stop_token_ids), [], model.training
    model.eval()
    try:
        way = way_of(model)
        for chosen in chunks(prompt_ids, step, one_length=way.lengths == "one"):
            texts = Texts(model, [prompt_ids[prompt] for prompt in chosen], samples_per_prompt, way)
            tokens = _decode_loop(
                texts, noise[chosen].flatten(0, 1).to(model.device), temperature,
                torch.tensor(sorted(stop), dtype=torch.long, device=model.device),
            ).tolist()  # fmt: skip
            for row, ids in enumerate(tokens):
                prompt, number = chosen[row // samples_per_prompt], row % samples_per_prompt
                end = next((t + 1 for t, token in enumerate(ids) if token in stop), len(ids))
                completions.append(Completion(prompt, number, list(prompt_ids[prompt]), ids[:end]))
    finally:
        model.train(training)
    return completions


def _decode_loop(texts: Texts, noise, temperature, stop_ids) -> torch.Tensor:
    """Sample in step behind each text; rows that have ended are dropped now and then. -> tokens [B, steps]."""
    steps = noise.shape[1]
    rows = torch.arange(len(noise), device=noise.device)  # which response each row of the shrinking batch is
    tokens = stop_ids.new_zeros(noise.shape) + (stop_ids[0] if len(stop_ids) else 0)
    ended = torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
    finite = torch.ones((), dtype=torch.bool, device=noise.device)
    for t in range(steps):
        cumulative = torch.softmax(texts.logits.float() / temperature, dim=-1).double().cumsum(-1)  # [B, V]
        finite &= cumulative[:, -1].isfinite().all()
        target = torch.minimum(noise[rows, t] * cumulative[:, -1], cumulative[:, -1].nextafter(noise.new_zeros(())))
        token = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
        token = token.clamp(max=cumulative.shape[-1] - 1)
        tokens[rows, t] = token
        ended |= torch.isin(token, stop_ids)
        if t == steps - 1:
            break
        if t % 4 == 3 or t == 0:
            alive = (~ended).nonzero().squeeze(-1)
            if len(alive) == 0:
                break
            if len(alive) <= 0.9 * len(ended) and texts.way.movable:
                texts.keep(alive)
                rows, ended, token = (x[alive] for x in (rows, ended, token))
        texts.append(token)
    if not finite:
        raise RolloutError("the policy's logits hold NaN or only -inf: the model has diverged")
    return tokens


def warn_ignored_sampling_settings(model) -> None:
    """Say once which sampling settings of the checkpoint have no effect on training."""
    ignored = ignored_sampling_settings(model)
    if ignored:
        warnings.warn(
            f"the model's generation_config asks for {ignored}; training samples from the whole distribution instead, "
            "since log-probs of the cut one would not match the loss",
            stacklevel=2,
        )
