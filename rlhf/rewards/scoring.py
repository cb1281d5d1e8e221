"""From responses to scores: a reward model, Python reward functions, or both, weighted and summed.

A reward function is `f(prompts, completions, completion_ids, **columns)`, called by these names, or in this order if it
has others, and returns one entry a response:

- a number: the reward of the response, which stands at its last token;
- None: no reward from this function for this response; another one must give it one;
- a list of as many numbers as the response has tokens (stop token included): process rewards, one for each token;
- {"steps": [(end, reward), ...]}: process rewards of steps; `end` counts the response's tokens up to and including the
  step's last one, so that the step ends with completion_ids[row][end - 1] and the last step's `end` may be the
  response's length. Several steps may end at one token: their rewards are added.
"""

import functools
import inspect
import itertools
import json
import logging
import math
import numbers

import torch

from .. import models
from ..data import DataError, answer_of, encode_sampled, encode_within, fit_prompt
from ..data.files import Bad
from ..metrics import Averages
from ..models.sequences import join, response_scores
from ..own_code import load_named
from ..rollouts.sampling import Rollouts
from .checkers import BUILT_IN

logger = logging.getLogger(__name__)
NAMES = ("prompts", "completions", "completion_ids")


class Scorer:
    """Scores the responses of a run, on each process its own."""

    def __init__(self, trainer, functions):
        self.trainer, self.functions, self.server = trainer, named(functions), trainer.reward_server
        self.has_model = trainer.reward_model is not None or self.server is not None
        parts = ["reward_model"] * self.has_model + list(self.functions)
        weights = trainer.args.reward_weights or [1.0] * len(parts)
        if len(weights) != len(parts):
            raise ValueError(f"reward_weights: got {len(weights)} numbers, want one for each of {', '.join(parts)}")
        self.weights = dict(zip(parts, weights))
        self.own_tokens = trainer.own_tokens
        if self.server is not None:
            self._meet_server()

    def _meet_server(self) -> None:
        """Ask the server for a score and for its context, before anything is sampled."""
        self.server.check([0])
        context, longest = self.server.context, max(self.trainer.prompts.lengths) + self.trainer.args.response_length
        if context and self.own_tokens is None and longest > context:
            raise ValueError(
                f"reward_server: reads at most {context} tokens, prompts and responses have up to {longest}; "
                "lower max_prompt_length or response_length, or start it with a larger --max-model-len"
            )

    def describe(self) -> dict:
        """What run.json tells about the rewards."""
        tokens = "the policy's ids, unchanged" if self.has_model else None
        if self.own_tokens is not None:
            tokens = "the reward model's own: responses are decoded and encoded again"
        server = {} if self.server is None else {"reward_server_bias": self.server.bias}
        return {"weights": self.weights, "reward_model_tokens": tokens, **server}

    def __call__(self, rows: list[dict], rollouts: Rollouts, averages=None) -> torch.Tensor:
        """Return the score of each response, [B] fp32, that stands at its last token.

        Process rewards go to `rollouts.step_rewards`, [B, T] fp32, or None where no function gave any. The mean reward
        of each part goes into `averages`, before its weight, where there are functions.
        """
        averages = Averages() if averages is None else averages
        scores = torch.zeros(len(rollouts.response_ids), dtype=torch.float32, device=self.trainer.accelerator.device)
        if self.has_model:
            found = self.reward_model_scores(rows, rollouts)
            scores = scores + self.weights["reward_model"] * found
            if self.functions:
                averages.add({"rewards/reward_model/mean": found.mean()}, len(found))
        return scores + self.function_scores(rows, rollouts, averages) if self.functions else scores

    def function_scores(self, rows: list[dict], rollouts: Rollouts, averages: Averages) -> torch.Tensor:
        """Weighted sum of the functions' rewards at the last tokens, [B] fp32; sets `rollouts.step_rewards`.

        Where a function gave process rewards on any process, all processes have step rewards.
        """
        arguments, columns = self._arguments(rows, rollouts)
        places, length = [row["at"] for row in rows], self.trainer.args.response_length
        ends, steps = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), length, dtype=torch.float64)
        rewarded = torch.full((len(rows),), self.has_model, dtype=torch.bool)
        has_steps = False
        for name, function in self.functions.items():
            own_ends, own_steps, given = call(name, function, arguments, columns, places)
            has_steps = has_steps or any(own_steps)
            own_ends, own_steps = torch.tensor(own_ends, dtype=torch.float64), padded(own_steps, length)
            ends += self.weights[name] * own_ends
            steps += self.weights[name] * own_steps
            rewarded |= torch.tensor(given)
            total, count = (own_ends + own_steps.sum(-1)).sum().item(), sum(given)
            averages.add({f"rewards/{name}/mean": total / max(count, 1)}, count)
        if not rewarded.all():
            place = places[rewarded.tolist().index(False)]
            raise ValueError(f"reward_fn: got None from every function for the row {place}, want a number from one")
        device = self.trainer.accelerator.device
        has_steps = (
            self.trainer._sum(torch.tensor(has_steps, dtype=torch.float32)) > 0
        )  # on any process, so that all do the same
        rollouts.step_rewards = steps.float().to(device) if has_steps else None
        return ends.float().to(device)

    def reward_model_scores(self, rows: list[dict], rollouts: Rollouts) -> torch.Tensor:
        """Score with the reward model, [B] fp32: on the ids as sampled, or decoded and encoded by its own tokenizer."""
        trainer = self.trainer
        scores = torch.zeros(len(rollouts.response_ids), dtype=torch.float32, device=trainer.accelerator.device)
        if self.own_tokens is not None:  # 15
            rollouts = self.own_tokens(rows, rollouts)
            self._check_context(rows, rollouts)
        if self.server is not None:
            texts = [a + b for a, b in zip(rollouts.prompt_ids, rollouts.response_ids, strict=True)]
            return scores.copy_(torch.tensor(self.server(texts, [row["at"] for row in rows])))
        for chunk in trainer._all_chunks(rollouts):
            if self.own_tokens is None:
                batch = trainer._join(rollouts, chunk)
            else:
                prompts, responses = ([ids[i] for i in chunk] for ids in (rollouts.prompt_ids, rollouts.response_ids))
                batch = join(prompts, responses, scores.device)
            scores[chunk] = response_scores(trainer.reward_model, batch)
        return scores

    def _check_context(self, rows, rollouts: Rollouts) -> None:
        context = reward_context(self.trainer)
        for row, prompt, response in zip(rows, rollouts.prompt_ids, rollouts.response_ids):
            if context and len(prompt) + len(response) > context:
                raise ValueError(
                    f"{row['at']}: prompt and response have {len(prompt) + len(response)} tokens of the reward model, "
                    f"longer than its context of {context}; a response is not cut, so lower response_length"
                )

    def _arguments(self, rows, rollouts):
        completions = self.trainer._decode(rollouts.response_ids)
        taken = ("prompt", "prompts", "completions", "completion_ids", "prompt_ids", "row_number", "at")
        fields = itertools.chain(self.trainer.prompts.fields, *rows)
        names = dict.fromkeys(name for name in fields if name not in taken)
        columns = {name: [row.get(name) for row in rows] for name in names}
        return ([row["prompt"] for row in rows], completions, [list(ids) for ids in rollouts.response_ids]), columns


def named(functions) -> dict:
    """Functions by the names that metrics carry; a repeated name gets a number."""
    found = {}
    for function in functions:
        if not callable(function):
            raise ValueError(f"reward_fn: got {function!r}, want a function or a list of functions")
        inner = function
        while isinstance(inner, functools.partial):
            inner = inner.func
        name = base = getattr(inner, "__name__", type(inner).__name__)
        for number in itertools.count(2):
            if name not in found and name != "reward_model":
                break
            name = f"{base}_{number}"
        found[name] = function
    return found


def reward_functions(reward_fn, names: str | None) -> list:
    """The functions of a run: those given in Python (one, a list, or None), or those that `--reward_function` names."""
    if reward_fn is not None and names:
        raise ValueError(f"reward_function: got {names!r} and a reward_fn, want one of them")
    if reward_fn is not None:
        return list(reward_fn) if isinstance(reward_fn, (list, tuple)) else [reward_fn]
    modules = {}
    return [load_function(name.strip(), modules) for name in (names or "").split(",") if name.strip()]


def load_function(name: str, modules: dict):
    """A reward by its built-in name, or one of the user's own; see `own_code.load_named`."""
    return BUILT_IN[name] if name in BUILT_IN else load_named("reward_function", name, BUILT_IN, modules)


def call(name: str, function, arguments, columns: dict, places: list[str]):
    """Call a reward function on B responses and check what it returns.

    Returns:
        (ends, steps, given), B entries each: the reward at the last token, 0.0 where there is none; a list of
        (end, reward), empty where there are none; and whether there was any.
    Raises:
        ValueError: the function raised, or an entry is none of the kinds above; names function and row.
    """
    try:
        entries = list(apply(function, arguments, columns))
    except Exception as error:
        where = culprit(function, arguments, columns, places)
        raise ValueError(f"reward_fn: {name} raised {type(error).__name__}: {error}{where}") from error
    count, ids = len(places), arguments[2]
    if len(entries) != count:
        raise ValueError(f"reward_fn: got {len(entries)} scores, want {count} finite numbers or None (from {name})")
    parsed = []
    for entry, tokens, place in zip(entries, ids, places):
        try:
            parsed.append(parse(entry, len(tokens)))
        except ValueError as error:
            raise ValueError(f"reward_fn: {error} (from {name}, for the row {place})") from None
    return [list(part) for part in zip(*parsed)] if parsed else ([], [], [])


def apply(function, arguments, columns: dict):
    """Call a function with the three lists by their names, as TRL does; in that order where it has other names."""
    named = {**dict(zip(NAMES, arguments, strict=True)), **columns}
    try:
        inspect.signature(function).bind(**named)
    except (TypeError, ValueError):  # other names, or a callable without a signature
        return function(*arguments, **columns)
    return function(**named)


def culprit(function, arguments, columns, places) -> str:
    """Where a function that raised on a batch raises on one row alone, too: that row."""
    for row, place in enumerate(places):
        try:
            apply(function, [[part[row]] for part in arguments], {key: [part[row]] for key, part in columns.items()})
        except Exception:
            return f" (for the row {place})"
    return f" (for the rows {places[0]} to {places[-1]} together, not for any of them alone)"


def parse(entry, tokens: int):
    """One entry of a reward function -> (reward at the last token, steps, whether there is a reward)."""
    entry = entry.tolist() if hasattr(entry, "tolist") else entry  # of numpy and torch
    if entry is None:
        return 0.0, [], False
    if isinstance(entry, dict):
        if entry.keys() != {"steps"}:
            raise ValueError(f"got a dict with {', '.join(map(repr, entry)) or 'no keys'}, want {{'steps': [...]}}")
        steps = []
        for step in entry["steps"]:
            if not (isinstance(step, (tuple, list)) and len(step) == 2):
                raise ValueError(f"got the step {step!r}, want (end, reward)")
            end = step[0].tolist() if hasattr(step[0], "tolist") else step[0]
            if not (isinstance(end, int) and 1 <= end <= tokens):
                raise ValueError(f"got a step that ends after {end!r} tokens, want 1 to {tokens}")
            steps.append((end, finite(step[1])))
        return 0.0, steps, True
    if isinstance(entry, (list, tuple)):
        if len(entry) != tokens:
            raise ValueError(f"got {len(entry)} rewards of tokens, want {tokens}")
        return 0.0, [(end, finite(reward)) for end, reward in enumerate(entry, start=1)], True
    return finite(entry), [], True


def finite(reward) -> float:
    reward = reward.tolist() if hasattr(reward, "tolist") else reward
    try:
        value = float(reward) if isinstance(reward, numbers.Real) else math.nan
    except OverflowError:  # an integer beyond all floats
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"got {reward!r}, want a finite number or None")
    return value


def padded(steps: list[list[tuple[int, float]]], length: int) -> torch.Tensor:
    """[(end, reward), ...] of B responses -> [B, T] fp64, each reward at the last token of its step."""
    found = torch.zeros(len(steps), length, dtype=torch.float64)
    for row, pairs in enumerate(steps):
        for end, reward in pairs:
            found[row, end - 1] += reward
    return found


class OwnTokens:
    """Prompts and responses as the ids on which a reward model with another tokenizer was trained.

    A response is decoded with the policy's tokenizer, without the token that ended it, and encoded as the reward
    model's training data were; one that was cut off gets no end token. An answer to a chat becomes a message, and is
    rendered by the reward model's own template.

    Args:
        room: tokens that prompt and response may have, for which a prompt is cut; None = nothing is cut.
    """

    def __init__(self, policy_tokenizer, tokenizer, room=None):
        self.policy_tokenizer, self.tokenizer, self.room = policy_tokenizer, tokenizer, room

    def answer(self, prompt, prompt_ids, response_ids, ended: bool):
        """The response as it goes on after its prompt: a text, or the message of an assistant."""
        kept, is_text = response_ids[:-1] if ended else response_ids, isinstance(prompt, str)
        head, whole, alone = (
            self.policy_tokenizer.decode(ids, skip_special_tokens=is_text)
            for ids in (prompt_ids, [*prompt_ids, *kept], kept)
        )
        text = whole[len(head) :] if whole.startswith(head) else alone  # some drop the space before a first word
        return text if is_text else answer_of(self.policy_tokenizer, prompt, text)

    def __call__(self, rows: list[dict], rollouts: Rollouts) -> Rollouts:
        prompts, responses = [], []
        for row, *sampled in zip(rows, rollouts.prompt_ids, rollouts.response_ids, rollouts.ended, strict=True):
            try:
                answer = self.answer(row["prompt"], *sampled)
                prompt, response = self._encoded(row["prompt"], answer, ended=sampled[-1])
            except (Bad, DataError) as error:
                raise DataError(f"{row['at']}: of the reward model's tokenizer: {error}") from error
            prompts.append(prompt)
            responses.append(response)
        return Rollouts(prompts, responses, list(rollouts.ended))

    def _encoded(self, prompt, answer, *, ended):
        ids, response = encode_sampled(self.tokenizer, prompt, answer, ended=ended)
        room = None if self.room is None else self.room - len(response)
        if room is not None and 0 < room < len(ids):
            shorter = encode_within(self.tokenizer, prompt, room)[0]
            ids, response = encode_sampled(self.tokenizer, shorter, answer, ended=ended)
            ids = fit_prompt(self.tokenizer, ids, room)
        return ids, response


def own_tokens(trainer) -> OwnTokens | None:
    """The way to the reward model's ids where `reward_tokenizer` is auto and its tokenizer is not the policy's.

    Raises:
        ValueError: the value network would have to start from that reward model, or from a server's.
    """
    args = trainer.args
    given = args.reward_model_path, args.value_model_path, trainer.given.value_model
    if trainer.reward_server is not None and given == (None, None, None) and args.advantage == "gae":
        raise ValueError(
            "value_model_path: got none, and the value network cannot start from a reward model on a server; give "
            f"{args.sft_model_path} to start from the policy, with a new head, a value network, or reward_model_path, "
            "the server's model"
        )
    if (trainer.reward_model is None and trainer.reward_server is None) or args.reward_tokenizer == "same":
        return None
    context = reward_context(trainer) if args.long_prompts == "truncate" else None
    options = {"trust_remote_code": args.trust_remote_code}
    own = tokens_of_other(trainer.tokenizer, args.reward_model_path, context, **options)
    if own is not None and args.value_model_path is None and args.advantage == "gae":
        raise ValueError(
            "value_model_path: got none, and the value network cannot start from a reward model of another tokenizer; "
            f"give {args.sft_model_path} to start from the policy, with a new head, or a value network of its tokenizer"
        )
    return own


def reward_context(trainer) -> int | None:
    """The most tokens that the reward model reads, here or on its server; None where nobody says."""
    server = trainer.reward_server
    return models.context_length(trainer.reward_model) if server is None else server.context


def tokens_of_other(tokenizer, path, room=None, **options) -> OwnTokens | None:
    """The way to the ids of the reward model at `path` where its tokenizer is not this one; None where it is.

    Args:
        room: as in `OwnTokens`.
        options: of `models.load_tokenizer`.
    """
    other = models.load_tokenizer(path, **options)
    if same_tokenizer(other, tokenizer):
        return None
    logger.warning("the reward model has another tokenizer: responses are decoded, and encoded again for it")
    return OwnTokens(tokenizer, other, room)


def as_read(own: OwnTokens | None, prompts, rollouts: Rollouts) -> Rollouts:
    """Rollouts as their reward model reads them: unchanged, or by its own tokenizer."""
    return rollouts if own is None else own([{"prompt": prompt, "at": "prompts"} for prompt in prompts], rollouts)


def same_tokenizer(first, second) -> bool:
    """Whether two tokenizers give the same ids to every prompt and completion."""

    def state(tokenizer):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend is not None else {}
        rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
        return tokenizer.get_vocab(), rules, tokenizer.eos_token_id, tokenizer.chat_template, type(tokenizer).__name__

    return state(first) == state(second)
