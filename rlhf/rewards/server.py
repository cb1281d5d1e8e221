"""A reward model behind HTTP: token ids in, a score each out, as vLLM's `/classify` gives it.

    vllm serve runs/reward --runner pooling --dtype float32 --served-model-name reward
    rlhf ppo ... --reward_server http://localhost:8000 --reward_model_path runs/reward

The server is asked for what the model's head gives, without its activation (vLLM's would be a sigmoid). The calibration
that `rlhf reward` leaves in the model's config (`reward_bias`) is not known to it, and is subtracted here, once.
"""

import functools
import json
import logging
import math
from concurrent.futures import ThreadPoolExecutor

from .. import models
from ..servers import JsonClient, Refused, ServerError

logger = logging.getLogger(__name__)
IN_FLIGHT = 4  # questions at a time, so that the server need not wait for the next one


class RewardServer:
    """Scores of texts, given as ids.

    Args:
        client: a `JsonClient`.
        bias: subtracted from each score.
        batch_size: texts a question.
    """

    def __init__(self, client: JsonClient, bias: float, *, batch_size: int = 64):
        self.client, self.bias, self.batch_size = client, bias, batch_size
        self.where = f"{client.setting}: {client.url}/classify"

    def __call__(self, texts: list[list[int]], places: list[str]) -> list[float]:
        """The calibrated score of each text, in their order.

        Args:
            places: where each text's prompt stands, for messages.
        Raises:
            ServerError: the server cannot be reached or refuses; or not every text has one finite score.
        """
        starts = range(0, len(texts), self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            found = pool.map(lambda part: self._ask(texts[part], places[part]), parts)
            return [score - self.bias for scores in found for score in scores]

    def check(self, text: list[int]) -> None:
        """Ask for one score, so that a wrong address is told at the start; warn if it may be a probability."""
        raw, activated = (self._ask([text], ["of the check"], use_activation=on)[0] for on in (False, True))
        if raw == activated and 0.0 <= raw <= 1.0:
            logger.warning(
                "%s: gives %g with its activation and without it: if the server does not know use_activation, its "
                "scores are probabilities, not rewards", self.where, raw,
            )  # fmt: skip

    @functools.cached_property
    def context(self) -> int | None:
        """The most tokens that a text may have, of the only model of a vLLM server; None where it does not say."""
        try:
            listed = self.client.get("/v1/models")["data"]
            return int(listed[0]["max_model_len"]) if len(listed) == 1 else None
        except (Refused, LookupError, TypeError, ValueError):
            return None

    def _ask(self, texts, places, *, use_activation: bool = False) -> list[float]:
        answer = self.client.post("/classify", {"input": texts, "use_activation": use_activation})
        data = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
            raise ServerError(
                f"{self.where}: want {{'data': [{{'index', 'probs'}}, ...]}}, got {json.dumps(answer)[:200]}"
            )
        if len(data) != len(texts):
            raise ServerError(f"{self.where}: got {len(data)} scores, want {len(texts)}")
        by_index = {entry.get("index"): entry.get("probs") for entry in data}
        if by_index.keys() != set(range(len(texts))):
            got = ", ".join(str(entry.get("index")) for entry in data[:20])
            raise ServerError(f"{self.where}: got scores of the texts {got}, want each of 0 to {len(texts) - 1} once")
        self._check_tokens(answer, texts)
        return [self._score(by_index[index], place) for index, place in enumerate(places)]

    def _check_tokens(self, answer: dict, texts) -> None:
        """All tokens of the texts were read, and no others: nothing was cut off, no token put in front."""
        usage = answer.get("usage")
        read, sent = usage.get("prompt_tokens") if isinstance(usage, dict) else None, sum(map(len, texts))
        if read is not None and read != sent:
            raise ServerError(f"{self.where}: read {read} tokens, want the {sent} that were sent")

    def _score(self, probs, place: str) -> float:
        if not isinstance(probs, list) or len(probs) != 1:
            count = len(probs) if isinstance(probs, list) else repr(probs)
            raise ServerError(f"{self.where}: got {count} numbers for a text, want 1: a reward model has one label")
        score = probs[0]
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise ServerError(f"{self.where}: got the score {score!r} for the row {place}, want a finite number")
        return float(score)


def reward_server(run) -> RewardServer | None:
    """The server that a PPO run's settings name, or None.

    Raises:
        ValueError: no such address; a reward model was given as well; it is not known what to subtract from the
            scores, or where the value network starts.
    """
    args = run.args
    if args.reward_server is None:
        return None
    if run.given.reward_model is not None:
        raise ValueError("reward_server: got an address and a reward_model, want one of them")
    client = JsonClient("reward_server", args.reward_server, timeout=args.reward_server_timeout)
    if args.reward_model_path is None:
        _check_alone(args)
    return RewardServer(client, bias_of(args), batch_size=args.local_rollout_forward_batch_size)


def _check_alone(args) -> None:
    """What a server without the model's folder cannot tell."""
    if args.reward_tokenizer != "same":
        raise ValueError(
            f"reward_tokenizer: got {args.reward_tokenizer}, want same with reward_server alone, or reward_model_path "
            "for its tokenizer"
        )
    if args.reward_server_bias is None:
        raise ValueError(
            "reward_server_bias: got none, want what is subtracted from the server's scores: reward_bias in the "
            "config.json of its model, 0 where there is none; or reward_model_path, to read it there"
        )


def bias_of(args) -> float:
    """What is subtracted from the scores: the setting, which must be what the config of `reward_model_path` says.

    Raises:
        ValueError: the two differ; the path holds no reward model.
    """
    if args.reward_model_path is None:
        return args.reward_server_bias
    path, trust = args.reward_model_path, args.trust_remote_code
    if not models.is_reward_model(path, trust):
        raise ValueError(f"reward_model_path: {path!r} is not a reward model")
    folder = models.resolve_model_path(path, trust_remote_code=trust)
    bias = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("reward_bias", 0.0)
    if args.reward_server_bias not in (None, bias):
        raise ValueError(
            f"reward_server_bias: got {args.reward_server_bias}, want {bias}, the reward_bias of {path}, or none"
        )
    return float(bias)
