"""Reading the user's data: every row is checked before any training starts, and a bad one is named by file and line."""

import logging
import random
from itertools import chain, islice
from pathlib import Path

from . import formats, large, rankings
from .cells import typed
from .files import Bad, DataError, read, size
from .messages import (
    Chat,
    after_last_question,
    check_answer,
    joined,
    lacks,
    messages_of,
    prompt_of,
    said,
    text_of,
    with_template_inputs,
)
from .mixtures import mixed, named_sets
from .problems import Problems
from .store import Rows, digests_of, take
from .tables import unpadded

logger = logging.getLogger("rlhf")

KINDS = ("sft", "ranked", "preference", "unpaired", "prompts", "text")
FIRST = 50


def reading(args):
    """How a run's settings say that data are read, as options of `load_rows` and `rows_of`."""
    return {
        "column_map": args.columns,
        "data_format": args.data_format,
        "bad_rows": args.bad_rows,
        "num_proc": args.dataset_num_proc,
    }


def load_rows(
    name_or_path, kind, *, split="train", config=None, columns=False, column_map=None, data_format="auto",
    bad_rows="error", num_proc=None,
):  # fmt: skip
    """Read and check every row of a data file (or of a set of the `datasets` package) before it is used.

    Args:
        name_or_path: a jsonl, json, csv, tsv, parquet, arrow or (kind "text") txt file, also compressed; a pattern of
            such names; a folder of splits and shards; else a name that `datasets.load_dataset` knows, if that package
            is installed. Several, with commas between them, are read as one, with shares: `a.jsonl:0.7,b.jsonl:0.3`.
        kind: "sft" (`text`, `messages` or `prompt` + `completion`), "ranked" (`prompt` + `completions` + `ranks` or
            `scores`, or `prompt` + `chosen` + `rejected`; optional fields: see rankings.py), "preference" (`prompt` +
            `chosen` + `rejected`), "unpaired" (`prompt` + `completion` + `label`; a pair gives two rows), "prompts",
            "text" (or a text file).
        split, config: which split of a folder or of a named data set, and which configuration of the latter.
        columns: True keeps the other fields of a row too, unchecked.
        column_map: which columns hold what, as --columns says it ("prompt=instruction+input,completion=output").
        data_format: the name of a public layout of rows, "own" (fields as above), or "auto": recognised and told.
        bad_rows: "error" raises for them, "skip" leaves them out and tells how many and why.
    Returns:
        Dicts with the fields of their kind and (but for `columns`) no other, and `at`, the place a row came from
        ("file:line"). A prompt of messages is a Chat and its completions are lists of messages; else all are strings.
        Ranks are integers, lower is better.
    Raises:
        DataError: what is wrong, by file and line; also when the file is missing or holds no rows.
    """
    _check_kind(kind)
    names, weights = zip(*named_sets(name_or_path), strict=True)
    if len(names) > 1:
        options = {"split": split, "config": config, "columns": columns, "column_map": column_map}
        options |= {"data_format": data_format, "bad_rows": bad_rows, "num_proc": num_proc}
        return mixed([load_rows(name, kind, **options) for name in names], names, weights)
    name = str(name_or_path)
    if columns or size(name, split, config) < large.BYTES:
        found = read(name, kind, split, config)
        return _checked(found, name, f"{name}:1", kind, columns, column_map, data_format, bad_rows)
    rows, said = large.load(
        name, kind, split, config, [column_map, data_format], first=FIRST, num_proc=num_proc,
        convert=lambda first: formats.conversion(kind, column_map, data_format, first),
        check=lambda at, raw, each: checked_rows(at, raw, kind, each),
    )  # fmt: skip
    tell_format(name, said["format"], said["note"])
    _settle(said["problems"], said["total"], bad_rows)
    return _some(rows, f"{name}:1", said["total"], said["note"])


def rows_of(rows, kind, *, name, columns=False, column_map=None, data_format="auto", bad_rows="error", num_proc=None):
    """Check rows that are in memory as `load_rows` checks those of a file.

    Args:
        rows: dicts, in a list or a `datasets.Dataset`; or a file, as in `load_rows`. A field that is None is absent.
            What `load_rows` gave of a large file stays as it is.
        kind, columns, column_map, data_format, bad_rows, num_proc: as in `load_rows`.
        name: the argument that holds the rows, for messages.
    Returns:
        As `load_rows`; `at` is `name[index]`.
    Raises:
        DataError: what is wrong with a row; no rows.
        ValueError: `rows` is no list of dicts.
    """
    _check_kind(kind)
    if isinstance(rows, (str, Path)):
        options = {"column_map": column_map, "data_format": data_format, "bad_rows": bad_rows, "num_proc": num_proc}
        return load_rows(rows, kind, columns=columns, **options)
    if isinstance(rows, Rows) and rows.kind == kind:
        return rows
    if isinstance(rows, dict):
        raise ValueError(f"{name}: got a {type(rows).__name__} of {', '.join(map(str, rows))}, wants one split's rows")
    if not hasattr(rows, "__iter__"):
        raise ValueError(f"{name}: got {type(rows).__name__}, wants a list of dicts, a datasets.Dataset or a file")
    return _checked(_in_memory(rows, name), name, name, kind, columns, column_map, data_format, bad_rows)


def _in_memory(rows, name):
    is_table = hasattr(rows, "features")  # of the package `datasets`
    for index, row in enumerate(rows):
        yield f"{name}[{index}]", unpadded(row) if is_table else row


def _check_kind(kind):
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, wants one of {', '.join(KINDS)}")


def _checked(found, source, place, kind, columns, column_map, data_format, bad_rows):
    """The rows among ("place", raw row) pairs in the form that `load_rows` gives; bad ones are an error or left out."""
    found = iter(found)
    first = list(islice(found, FIRST))
    if not first:
        raise DataError(f"{place}: holds no rows")
    conversion = formats.conversion(kind, column_map, data_format, [raw for _, raw in first])
    tell_format(source, conversion.name, conversion.note)
    found, each = conversion.prepared(chain(first, found))
    rows, problems, total = [], [], 0
    for total, (at, raw) in enumerate(found, start=1):  # noqa: B007
        try:
            rows += checked_rows(at, raw, kind, each, columns=columns)
        except Bad as error:
            problems.append((at, error))
    _settle(problems, total, bad_rows)
    return _some(rows, place, total, conversion.note)


def tell_format(source, name, note):
    if name:
        logger.warning("%s: read as the format %s%s", source, name, f" ({note})" if note else "")


def _settle(found, total, bad_rows):
    problems = Problems(bad_rows)
    for at, reason in found:
        problems.add(at, reason)
    problems.settle(total)


def _some(rows, place, total, note):
    if not len(rows):
        raise DataError(f"{place}: none of {total} rows gives one to learn from{f' ({note})' if note else ''}")
    return rows


def checked_rows(at, raw, kind, each, *, columns=False):
    """The rows of `load_rows` that one raw row gives.

    Args:
        raw: the row, or the Bad that stands in its place.
        each: of a `formats.Conversion`.
    Raises:
        Bad: what is wrong with it.
    """
    if isinstance(raw, Bad):
        raise raw
    if not isinstance(raw, dict):
        raise Bad(f"a row must be a JSON object with named fields, got {type(raw).__name__}")
    raw = {name: value for name, value in raw.items() if value is not None}
    return [{**row, "at": at} for ours in each(raw) for row in check_row(ours, kind, columns=columns)]


def check_row(raw, kind, *, columns=False):
    """What one row in our fields gives, in the form of `load_rows` but without `at`: a row, or of a pair as unpaired
    responses two.

    Raises:
        Bad: what is wrong with it.
    """
    raw = {name: value for name, value in raw.items() if value is not None}
    read = typed(raw)
    if kind == "unpaired" and "label" not in read and "chosen" in read:
        pair = _check_preference(read)
        sides = (("chosen", True), ("rejected", False))
        rows = [{"prompt": pair["prompt"], "completion": pair[name], "label": label} for name, label in sides]
    else:
        rows = [_CHECKS[kind](read)]
    return [{**raw, **row} for row in rows] if columns else rows


def _field(raw, name):
    if name not in raw:
        raise Bad(lacks(raw, name))
    return raw[name]


def _dialogue(raw):
    """The checked `messages` of a row, the last one an assistant's, and the index of the first that is none's."""
    value = raw["messages"]
    if not isinstance(value, list):
        raise Bad(f"`messages` must be a list of messages (or one as JSON), got {type(value).__name__}")
    messages = messages_of("messages", value)
    opening = next((index for index, message in enumerate(messages) if message["role"] != "assistant"), len(messages))
    if opening >= len(messages) - 1 or messages[-1]["role"] != "assistant":
        raise Bad("`messages` must hold at least two messages, the last one of the role 'assistant'")
    return messages, opening


def _split_dialogue(raw, messages, cut):
    prompt = with_template_inputs(raw, said("messages", messages[:cut]))
    check_answer("messages", messages[cut:], cut)
    return {"prompt": prompt, "completion": messages[cut:]}


def _check_sft(raw):
    if "messages" in raw:
        messages, opening = _dialogue(raw)
        roles = [message["role"] for message in messages]
        return _split_dialogue(raw, messages, roles.index("assistant", opening))
    if "prompt" not in raw and "text" in raw:
        return {"text": text_of("text", raw["text"])}
    return _prompt_and_completion(raw)


def _prompt_and_completion(raw):
    _field(raw, "prompt")
    prompt, (completion,) = joined(raw, {"completion": _field(raw, "completion")})
    return {"prompt": prompt, "completion": completion}


def _check_unpaired(raw):
    label = _field(raw, "label")
    if label not in (0, 1):
        raise Bad(f"`label` must be true (desired) or false, got {label!r}")
    if "messages" in raw:
        messages, _ = _dialogue(raw)
        row = _split_dialogue(raw, messages, after_last_question(messages))
    else:
        row = _prompt_and_completion(raw)
        if isinstance(raw["prompt"], str) and isinstance(raw["completion"], list):  # the last answer is judged
            messages = row["prompt"] + row["completion"]
            row = _split_dialogue(raw, messages, after_last_question(messages))
    return {**row, "label": bool(label)}


def _check_ranked(raw):
    if "completions" not in raw and "chosen" in raw:
        row = _check_preference(raw)
        prompt, completions = row["prompt"], [row["chosen"], row["rejected"]]
        raw = {"ranks": [0, 1], **{name: raw[name] for name in ("weight", "margin", "labeler") if name in raw}}
    else:
        completions = _field(raw, "completions")
        if not isinstance(completions, list):
            raise Bad(f"`completions` must be a list, got {type(completions).__name__}")
        if len(completions) < 2:
            raise Bad(f"`completions` must hold at least two completions to rank, got {len(completions)}")
        if "ranks" not in raw and "scores" not in raw:
            raise Bad(lacks(raw, "ranks"))
        prompt, completions = joined(raw, {f"completions[{i}]": value for i, value in enumerate(completions)})
    try:
        ranks = rankings.ranks_of_row(raw, len(completions))
        optional = rankings.optional_fields(raw, len(completions))
    except ValueError as error:
        raise Bad(str(error)) from None
    return {"prompt": prompt, "completions": completions, "ranks": ranks, **optional}


def _check_preference(raw):
    prompt, (chosen, rejected) = joined(raw, {name: _field(raw, name) for name in ("chosen", "rejected")})
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _check_prompts(raw):
    if "prompt" not in raw and "messages" in raw:
        messages = messages_of("messages", raw["messages"]) if isinstance(raw["messages"], list) else []
        raw = {**raw, "prompt": messages[: after_last_question(messages)]}
    if "prompt" not in raw and isinstance(raw.get("chosen"), list):
        return {"prompt": _check_preference(raw)["prompt"]}
    prompt = prompt_of("prompt", _field(raw, "prompt"))
    if isinstance(prompt, str) and _has_messages(raw):  # which asks what the other kinds of rows ask
        prompt = [{"role": "user", "content": prompt}]
    return {"prompt": with_template_inputs(raw, prompt)}


def _has_messages(raw):
    """Whether an answer in a row is messages."""
    answers = [raw.get(name) for name in ("completion", "chosen", "rejected")]
    answers += raw["completions"] if isinstance(raw.get("completions"), list) else []
    said = [answer[0] if isinstance(answer, list) and answer else answer for answer in answers]
    return any(isinstance(first, dict) and isinstance(first.get("role"), str) for first in said)


def _check_text(raw):
    return {"text": text_of("text", _field(raw, "text"))}


_CHECKERS = (_check_sft, _check_ranked, _check_preference, _check_unpaired, _check_prompts, _check_text)


_CHECKS = dict(zip(KINDS, _CHECKERS))


def plain(row):
    """A row of `load_rows` as fields that JSON can hold and `load_rows` reads back to the same row; without `at`."""
    found = {name: value for name, value in row.items() if name != "at"}
    prompt = row.get("prompt")
    if isinstance(prompt, Chat):
        inputs = {"tools": prompt.tools, "chat_template_kwargs": prompt.template_kwargs}
        found = {**found, "prompt": list(prompt), **{name: value for name, value in inputs.items() if value}}
    return found


def split_rows(rows, fraction, seed):
    """Hold out a share of the rows, split by prompt: no prompt is on both sides. The same seed gives the same split.

    Args:
        rows: a sequence of rows. Its `digests` (`prompt_digest` of each) and `take(indices)` are used if it has them.
        fraction: share of the prompts to hold out, in [0, 1). Above 0, at least one prompt is held out and one kept.
    Returns:
        (train, held_out), both in the order of `rows`.
    Raises:
        ValueError: fraction outside [0, 1), or all rows share one prompt.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: got {fraction}, wants a number in [0, 1)")
    if fraction == 0:
        return take(rows, range(len(rows))), []
    keys = list(map(bytes, digests_of(rows)))
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise ValueError(f"rows: got {len(prompts)} distinct prompt, wants at least 2 to hold one out")
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)])
    sides = ([], [])
    for index, key in enumerate(keys):
        sides[key in held].append(index)
    return take(rows, sides[0]), take(rows, sides[1])
