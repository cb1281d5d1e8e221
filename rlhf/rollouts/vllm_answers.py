"""What vLLM is asked for, and what must hold of its answers, whichever way they come.

The parameters leave the distribution whole and say so one by one, so that nothing of the model's generation_config or
of a server's defaults is left to apply. `ignore_eos` leaves the ends to `stop_token_ids`, which are PPO's; the stop
token stays in the response.
"""

import numpy

from .sampling import Completion, RolloutError

LEAST_TEMPERATURE = 0.01  # vLLM takes it in place of a lower one
CLAMPED = -9999.0  # what vLLM sends for a log-prob that is -inf or NaN
LOGPROBS_MODE = "processed_logprobs"
WRONG_MODE = (
    f"rollout_engine: vLLM has logprobs_mode {{}}, want {LOGPROBS_MODE}: those of softmax(logits / temperature), from "
    "which tokens are drawn"
)


def parameters(*, samples: int, response_length: int, temperature: float, stop_token_ids, seed: int) -> dict:
    """Arguments of vLLM's SamplingParams for K samples of a prompt; sample k has the seed `seed + k`.

    Raises:
        ValueError: a temperature that vLLM does not take.
    """
    if temperature < LEAST_TEMPERATURE:
        raise ValueError(f"temperature: got {temperature}, want at least {LEAST_TEMPERATURE} with rollout_engine vllm")
    return {
        "n": samples, "temperature": temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_tokens": 0, "max_tokens": response_length,
        "stop_token_ids": sorted(stop_token_ids), "ignore_eos": True, "logprobs": 0, "detokenize": False, "seed": seed,
    }  # fmt: skip


def seed_of(seed: int, prompt: int) -> int:
    """The seed of a prompt's first sample, in [0, 2^53): what JSON and every reader of it keep."""
    return int(numpy.random.SeedSequence([seed, prompt]).generate_state(1, numpy.uint64)[0] >> numpy.uint64(11))


def checked(completion: Completion, params: dict, *, finish_reason: str | None, vocabulary: int | None) -> Completion:
    """The completion, whose end and ids are what was asked for; the rest is `collect`'s to check.

    Raises:
        RolloutError: it broke off, is too long, ended for another reason than a stop token or its length, or holds
            ids that the policy has not, or log-probs that are no numbers.
    """
    ids, length = completion.response_ids, params["max_tokens"]
    at = f"vLLM's response to prompt {completion.prompt}, sample {completion.sample}"
    if finish_reason not in ("stop", "length"):
        raise RolloutError(f"{at} ended with finish_reason {finish_reason!r}")
    stopped = bool(ids) and ids[-1] in params["stop_token_ids"]
    if len(ids) > length or (len(ids) < length and not stopped):
        raise RolloutError(
            f"{at} has {len(ids)} tokens and ends with no stop token, want one or {length} tokens (response_length)"
        )
    if vocabulary is not None and not all(isinstance(token, int) and 0 <= token < vocabulary for token in ids):
        raise RolloutError(f"{at} holds ids outside of the policy's vocabulary of {vocabulary}")
    if any(not isinstance(value, int | float) or value <= CLAMPED for value in completion.log_probs or ()):
        raise RolloutError(f"{at} has log-probs that are -inf or no numbers: the policy may have diverged")
    return completion
