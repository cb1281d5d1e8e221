"""Measuring policies on held-out prompts, and `rlhf best-of-n`.

One rollout per policy serves every number: true (gold) score where there is a judge, the reward model's score, win rate
over SFT, KL from SFT, share of responses that end properly, length. The loss on held-out text shows the alignment tax.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from . import locks, models
from .checkpoint import write_json
from .data import as_text, encode_prompt, load_rows, plain
from .data.prompts import encode_prompts
from .disk import json_bytes, prepare_output_file, write_bytes
from .metrics import WinRate, best_of, best_of_n_kl, wilson_interval, win_rate
from .models.sequences import by_length, join, per_token_log_probs, response_scores
from .ranges import SEED, above, at_least, check_arguments
from .rewards.scoring import as_read, tokens_of_other
from .rollouts.sampling import Rollouts, sample
from .settings import ToolParser

__all__ = [
    "WinRate",
    "best_of",
    "best_of_n",
    "best_of_n_kl",
    "evaluate_policies",
    "held_out_loss",
    "response_log_probs",
    "reward_scores",
    "texts_of",
    "wilson_interval",
    "win_rate",
    "write_evaluation",
]

SAMPLING = {
    "response_length": (int, at_least(1)), "temperature": (float, above(0)), "samples_per_prompt": (int, at_least(1)),
    "seed": (int, SEED), "batch_size": (int, at_least(1)),
}  # fmt: skip
"""What the numbers of a sampling are, and their ranges."""


def texts_of(tokenizer, rollouts: Rollouts, stop_token_ids: Sequence[int]) -> list[str]:
    """Responses as text, without the stop token."""
    stop = set(stop_token_ids)
    kept = ([token for token in ids if token not in stop] for ids in rollouts.response_ids)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in kept]


def _batches(rollouts: Rollouts, batch_size: int):
    """Indices in batches of like length, the responses to one prompt together."""
    order = by_length(rollouts.prompt_ids, rollouts.response_ids)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _share_width(model, rollouts: Rollouts) -> int | None:
    """The width of a model that is to read rollouts which repeat prompts, and can share them; else None."""
    if len(set(map(tuple, rollouts.prompt_ids))) == len(rollouts.prompt_ids):
        return None
    longest = max(len(p) + len(r) for p, r in zip(rollouts.prompt_ids, rollouts.response_ids))
    return models.hidden_size(model) if models.share_prompts([model], longest) else None


@torch.no_grad()
def reward_scores(model, rollouts: Rollouts, *, batch_size: int = 64) -> list[float]:
    """The reward model's score of every prompt + response, on the very ids that were sampled, read at the last token.

    Raises:
        ValueError: a text is longer than the reward model's context. Nothing is cut: half a text has no score.
    """
    context = models.context_length(model)
    longest = max((len(p) + len(r) for p, r in zip(rollouts.prompt_ids, rollouts.response_ids, strict=True)), default=0)
    if context and longest > context:
        raise ValueError(f"the longest prompt + response has {longest} tokens, the reward model's context is {context}")
    scores, width = [0.0] * len(rollouts.prompt_ids), _share_width(model, rollouts)
    model.eval()
    for batch in _batches(rollouts, batch_size):
        prompts, responses = ([ids[i] for i in batch] for ids in (rollouts.prompt_ids, rollouts.response_ids))
        found = response_scores(model, join(prompts, responses, model.device, share_width=width))
        for i, score in zip(batch, found.tolist(), strict=True):
            scores[i] = score
    return scores


@torch.no_grad()
def response_log_probs(model, rollouts: Rollouts, *, batch_size: int = 64) -> list[float]:
    """log p(response | prompt) of every row in nats, summed over its tokens, at temperature 1."""
    sums, width = [0.0] * len(rollouts.prompt_ids), _share_width(model, rollouts)
    model.eval()
    for batch in _batches(rollouts, batch_size):
        prompts, responses = ([ids[i] for i in batch] for ids in (rollouts.prompt_ids, rollouts.response_ids))
        log_probs, mask, _ = per_token_log_probs(model, prompts, responses, temperature=1.0, share_width=width)
        for i, total in zip(batch, log_probs.double().where(mask, 0.0).sum(1).tolist(), strict=True):
            sums[i] = total
    return sums


def held_out_loss(model, tokenizer, texts: Sequence[str], *, max_length: int = 256, batch_size: int = 16) -> float:
    """Mean -log p per token of `texts`, nats: each with its EOS, cut after `max_length` tokens, first token given."""
    context = models.context_length(model) or max_length
    rows = [[*encode_prompt(tokenizer, text), tokenizer.eos_token_id][: min(max_length, context)] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ValueError("texts must hold at least one text of two tokens or more")
    rollouts = Rollouts([row[:1] for row in rows], [row[1:] for row in rows], [True] * len(rows))
    return -sum(response_log_probs(model, rollouts, batch_size=batch_size)) / sum(len(row) - 1 for row in rows)


def _room(readers, response_length, most=None) -> int | None:
    """Tokens that a prompt may have beside a response."""
    contexts = [models.context_length(model) for model in readers if model is not None]
    rooms = [context - response_length for context in contexts if context]
    if rooms and min(rooms) < 1:
        raise ValueError(
            f"response_length: got {response_length}, which leaves no room for a prompt in a context of "
            f"{min(rooms) + response_length}"
        )
    return min([*rooms, *([most] if most else [])], default=None)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    v = np.asarray(values, dtype=np.float64)
    return float(v.mean()), float(v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else math.nan


def evaluate_policies(
    policies: dict[str, str | Path],
    prompts: Sequence,
    *,
    long_prompts: str = "truncate",
    max_prompt_length: int | None = None,
    reward_model: str | Path | None = None,
    gold: Callable[[str, str, bool], float] | None = None,
    ends_properly: Callable[[str, bool], bool] = lambda text, ended: ended,
    texts: Sequence[str] = (),
    reference: str = "SFT",
    response_length: int = 48,
    temperature: float = 1.0,
    samples_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    on_policy: Callable[[str], None] = lambda name: None,
) -> dict:
    """Sample every policy on the same held-out prompts and measure it; the content of evaluation.json.

    Args:
        policies: name -> model directory; `reference` must be one of them. They share one tokenizer: the
            reference's, or if that has no chat template the first one that has.
        prompts: held-out prompts, strings or message lists.
        long_prompts: what becomes of prompts of more than max_prompt_length tokens, or that leave the models no room
            for a response: "truncate", "drop" or "error".
        reward_model: directory; the judge of win rates where there is no `gold`.
        gold: (prompt, completion, ended) -> true score, higher is better.
        ends_properly: (completion, ended) -> bool.
        texts: held-out text for the language-model loss; empty = not measured.
        samples_per_prompt: independent responses to each prompt.
        seed: each policy draws from its own stream, seed + its place.
        on_policy: called with each name before its turn (for progress).
    Returns:
        {"policies": [row], "responses": {name: [row]}, "judge", "prompts", "comparisons", "note"}. A policy's row holds
        name, gold, reward, win_rate, kl (nats per response), ends_properly, mean_length (tokens, stop token included),
        lm_loss (nats a token), and *_error, the standard errors.
    Raises:
        ValueError: `reference` is not among the policies, or no prompts.
    """
    check_arguments(SAMPLING, locals())
    if reference not in policies:
        raise ValueError(f"reference must be one of the policies {list(policies)}, got {reference!r}")
    if not prompts:
        raise ValueError("prompts must hold at least one held-out prompt")
    tokenizer = _tokenizer_of(policies, reference)
    reference_model = _policy(policies[reference], tokenizer, seed, dtype)
    scorer = models.load_reward_model(reward_model, dtype=dtype) if reward_model else None
    reader = tokens_of_other(tokenizer, reward_model) if reward_model else None
    room = _room([reference_model, scorer], response_length, max_prompt_length)
    prompts, prompt_ids = encode_prompts(tokenizer, prompts, room=room, long_prompts=long_prompts)
    rows, responses = [], {}
    for place, (name, path) in enumerate(policies.items()):
        on_policy(name)
        model = reference_model if name == reference else _policy(path, tokenizer, seed, dtype)
        stop = models.stop_token_ids(tokenizer, model)
        with torch.random.fork_rng():
            torch.manual_seed(seed + place)
            rollouts = sample(
                model,
                tokenizer,
                prompt_ids,
                response_length=response_length,
                temperature=temperature,
                stop_token_ids=stop,
                samples_per_prompt=samples_per_prompt,
                batch_size=batch_size,
            )
        found = texts_of(tokenizer, rollouts, stop)
        asked = [prompts[i // samples_per_prompt] for i in range(len(found))]
        columns = {"length": [len(ids) for ids in rollouts.response_ids]}
        own = response_log_probs(model, rollouts, batch_size=batch_size)
        theirs = own
        if model is not reference_model:
            theirs = response_log_probs(reference_model, rollouts, batch_size=batch_size)
        columns["kl"] = [p - q for p, q in zip(own, theirs)]
        if scorer is not None:
            columns["reward"] = reward_scores(scorer, as_read(reader, asked, rollouts), batch_size=batch_size)
        if gold is not None:
            columns["gold"] = [gold(p, text, e) for p, text, e in zip(asked, found, rollouts.ended)]
        row = {"name": name}
        for key, values in columns.items():
            key = "mean_length" if key == "length" else key
            row[key], row[f"{key}_error"] = _mean_and_error(values)
        row["ends_properly"] = float(np.mean([ends_properly(t, e) for t, e in zip(found, rollouts.ended)]))
        row["lm_loss"] = held_out_loss(model, tokenizer, texts, batch_size=batch_size) if texts else None
        rows.append(row)
        responses[name] = [
            {"prompt": as_text(p), "completion": text, "ended": e} | {key: values[i] for key, values in columns.items()}
            for i, (p, text, e) in enumerate(zip(asked, found, rollouts.ended))
        ]
    judge = "gold" if gold is not None else "reward" if scorer is not None else None
    for row in rows:
        row["win_rate"] = None
        if judge and row["name"] != reference:
            mine, rival = ([r[judge] for r in responses[n]] for n in (row["name"], reference))
            row["win_rate"] = asdict(win_rate(mine, rival, per_prompt=samples_per_prompt))
    count = len(prompts) * samples_per_prompt
    named = {"gold": "the gold score", "reward": "the reward model (the very model that PPO trained against)"}
    note = f"{len(prompts)} held-out prompts, {count} comparisons; ties count half; brackets: 95 % interval."
    return {
        "policies": rows,
        "responses": responses,
        "judge": judge,
        "prompts": len(prompts),
        "comparisons": count,
        "note": f"Judge: {named[judge]}. {note}" if judge else note,
    }


def _tokenizer_of(policies, reference):
    first = models.load_tokenizer(policies[reference])
    if first.chat_template:
        return first
    others = (models.load_tokenizer(path) for name, path in policies.items() if name != reference)
    return next((other for other in others if other.chat_template), first)


def _policy(path, tokenizer, seed, dtype):
    """A policy; a base model gets room for the tokens of the chat template that it was trained with later."""
    model = models.load_policy(path, dtype=dtype)
    models.make_room(model, tokenizer, seed)
    return model


def best_of_n(
    model_path,
    reward_model_path,
    prompts: Sequence,
    *,
    n_values: Sequence[int] = (1, 2, 4, 8, 16),
    response_length: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    gold: Callable[[str, str, bool], float] | None = None,
    places: Sequence[str] | None = None,
    long_prompts: str = "truncate",
    max_prompt_length: int | None = None,
    bad_rows: str = "error",
) -> tuple[list[dict], list[dict]]:
    """Sample max(n_values) responses a prompt once; for each n keep the one that the reward model likes best.

    For n below the maximum all whole groups of n are used, so small n are measured as precisely as large ones.

    Args:
        places: where each prompt comes from ("file:line"), for messages.
        long_prompts: what becomes of prompts of more than max_prompt_length tokens, or that leave the models no room
            for a response: "truncate", "drop" or "error".
        bad_rows: "skip" leaves out prompts that the chat template refuses.
    Returns:
        (table, choices): per n a row {n, kl (nats, upper bound), reward, gold or None, clipped_ratio, mean_length}; and
        per prompt the choice at the largest n {prompt, completion, score, ended}.
    """
    check_arguments(SAMPLING, locals())
    check_arguments({"n": (list[int], at_least(1))}, {"n": list(n_values)})
    tokenizer = models.load_tokenizer(model_path)
    model, scorer = models.load_policy(model_path), models.load_reward_model(reward_model_path)
    stop, most = models.stop_token_ids(tokenizer, model), max(n_values)
    room = _room([model, scorer], response_length, max_prompt_length)
    options = {"room": room, "long_prompts": long_prompts, "bad_rows": bad_rows}
    prompts, prompt_ids = encode_prompts(tokenizer, prompts, places, **options)
    torch.manual_seed(seed)
    rollouts = sample(
        model,
        tokenizer,
        prompt_ids,
        response_length=response_length,
        temperature=temperature,
        stop_token_ids=stop,
        samples_per_prompt=most,
        batch_size=max(batch_size, most),
    )
    reader, asked = tokens_of_other(tokenizer, reward_model_path), [prompt for prompt in prompts for _ in range(most)]
    scores = reward_scores(scorer, as_read(reader, asked, rollouts), batch_size=batch_size)
    found = texts_of(tokenizer, rollouts, stop)
    true = [gold(asked[i], text, rollouts.ended[i]) if gold else None for i, text in enumerate(found)]
    table = []
    for n in sorted(set(n_values)):
        whole = [i for start in range(0, len(scores), most) for i in range(start, start + most // n * n)]
        chosen = [whole[j] for j in best_of([scores[i] for i in whole], n, [rollouts.ended[i] for i in whole])]
        table.append(
            {
                "n": n,
                "kl": best_of_n_kl(n),
                "reward": float(np.mean([scores[i] for i in chosen])),
                "gold": float(np.mean([true[i] for i in chosen])) if gold else None,
                "clipped_ratio": float(np.mean([not rollouts.ended[i] for i in chosen])),
                "mean_length": float(np.mean([len(rollouts.response_ids[i]) for i in chosen])),
            }
        )
    choices = [
        plain({"prompt": asked[i], "completion": found[i], "score": scores[i], "ended": rollouts.ended[i]})
        for i in best_of(scores, most, rollouts.ended)
    ]
    return table, choices


def main(argv: Sequence[str] | None = None) -> int:
    """`rlhf best-of-n`: prints the table and, with --output_file, writes the chosen completions."""
    parser = ToolParser(
        prog="rlhf best-of-n",
        description="Sample n responses a prompt and keep the one that the reward model scores highest.",
    )
    parser.add_argument("--model_name_or_path", required=True, help="policy: a model directory, or 'demo'")
    parser.add_argument("--reward_model_path", required=True, help="reward model directory")
    parser.add_argument("--dataset_name", required=True, help="prompts: file, folder or data set with `prompt`")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="responses a prompt, one or several")
    parser.add_argument("--response_length", type=int, default=64, help="tokens, stop token included")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max_prompts", type=int, default=None, help="use only the first so many prompts")
    parser.add_argument("--batch_size", type=int, default=64, help="rows sampled and scored at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", help="which columns hold what, as of `rlhf ppo`")
    parser.add_argument("--data_format", default="auto", help="how a public data set is read, as of `rlhf ppo`")
    parser.add_argument("--bad_rows", default="error", choices=("error", "skip"), help="rows that cannot be used")
    parser.add_argument("--max_prompt_length", type=int, default=None, help="most tokens of a prompt")
    parser.add_argument("--long_prompts", default="truncate", choices=("truncate", "drop", "error"), help="longer ones")
    parser.add_argument("--output_file", default=None, help="jsonl file for the choices at the largest n")
    args = parser.parse_args(argv)
    try:
        counts = ("max_prompts", "max_prompt_length")
        check_arguments(dict.fromkeys(counts, (int | None, at_least(1))), vars(args))
        output = args.output_file and prepare_output_file(args.output_file)
        if output:
            locks.hold(output, is_file=True, option="output_file")
        read = {"column_map": args.columns, "data_format": args.data_format, "bad_rows": args.bad_rows}
        rows = load_rows(args.dataset_name, "prompts", **read)[: args.max_prompts]
        table, choices = best_of_n(
            args.model_name_or_path,
            args.reward_model_path,
            [row["prompt"] for row in rows],
            n_values=args.n,
            response_length=args.response_length,
            temperature=args.temperature,
            seed=args.seed,
            batch_size=args.batch_size,
            places=[row["at"] for row in rows],
            long_prompts=args.long_prompts,
            max_prompt_length=args.max_prompt_length,
            bad_rows=args.bad_rows,
        )
    except ValueError as error:
        parser.exit(2, f"rlhf best-of-n: {error}\n")
    print(f"{'n':>4}  {'KL bound, nats':>14}  {'RM score':>8}  {'cut':>5}  {'length':>6}")
    for row in table:
        print(
            f"{row['n']:>4}  {row['kl']:>14.3f}  {row['reward']:>8.3f}  {100 * row['clipped_ratio']:>3.0f} %  "
            f"{row['mean_length']:>6.1f}"
        )
    if output:
        write_bytes(output, b"".join(map(json_bytes, choices)))
        locks.release(output, is_file=True)
        print(output)
    return 0


def write_evaluation(directory: str | Path, evaluation: dict) -> Path:
    """Write evaluation.json, from which the report is made."""
    path = Path(directory) / "evaluation.json"
    write_json(path, evaluation)
    return path
