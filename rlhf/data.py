"""Reading the user's data and turning text into token ids. All stages go through here, so all see the same ids.

Two rules hold everywhere. A bad line is found before any training starts, and named by file and line. A prompt and a
completion are tokenised apart and joined as ids, so the ids that trained the reward model are the ids that the policy
samples.
"""

import json
import random
from pathlib import Path

from . import rankings

KINDS = ("sft", "ranked", "preference", "unpaired", "prompts", "text")
END_OF_TEXT = "<|endoftext|>"
_SHOWN_ERRORS = 10


class DataError(ValueError):
    """A row of the user's data that cannot be used. The message starts with `file:line: reason`."""


class _Bad(Exception):
    """What is wrong with one row; `load_rows` adds the place."""


def load_rows(name_or_path, kind, *, split="train", config=None, columns=False):
    """Read and check every row of a data file (or of a set of the `datasets` package) before it is used.

    Args:
        name_or_path: a .jsonl, .json, .parquet or (kind "text") .txt file; a folder holding `<split>.<one of these>`;
            else a name that `datasets.load_dataset` knows, if that package is installed.
        kind: "sft" (`text`, `messages` or `prompt` + `completion`), "ranked" (`prompt` + `completions` + `ranks` or
            `scores`, or `prompt` + `chosen` + `rejected`; optional fields: see rankings.py), "preference" (`prompt` +
            `chosen` + `rejected`), "unpaired" (`prompt` + `completion` + `label`), "prompts", "text" (or a text file).
        split, config: which split of a folder or of a named data set, and which configuration of the latter.
        columns: True keeps the other fields of a row too, unchecked.
    Returns:
        Dicts with the fields of their kind and (but for `columns`) no other, and `at`, the place a row came from
        ("file:line"). A string `context` has been put before the prompt, one empty line between. Ranks are integers,
        lower is better.
    Raises:
        DataError: what is wrong, by file and line; also when the file is missing or holds no rows.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, wants one of {', '.join(KINDS)}")
    rows, problems = [], []
    for at, raw in _read(str(name_or_path), kind, split, config):
        try:
            if isinstance(raw, _Bad):
                raise raw
            if not isinstance(raw, dict):
                raise _Bad(f"a row must be a JSON object with named fields, got {type(raw).__name__}")
            rows.append({**(raw if columns else {}), **_CHECKS[kind](raw), "at": at})
        except _Bad as error:
            problems.append(f"{at}: {error}")
    if len(problems) > _SHOWN_ERRORS:
        problems[_SHOWN_ERRORS:] = [f"... and {len(problems) - _SHOWN_ERRORS} more bad rows"]
    if problems:
        raise DataError("\n".join(problems))
    if not rows:
        raise DataError(f"{name_or_path}:1: holds no rows")
    return rows


def _read(name, kind, split, config):
    """Yield ("file:line", row) pairs; a line that cannot be parsed yields a _Bad in place of the row."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = [path / f"{split}{end}" for end in (".jsonl", ".json", ".parquet", ".txt")]
        path = next((file for file in files if file.is_file()), None)
        if path is None:
            raise DataError(f"{name}:1: the folder holds no {split}.jsonl, .json, .parquet or .txt")
    if not path.is_file():
        yield from _read_named(name, split, config)
        return
    readers = {".parquet": _read_parquet, ".json": _read_json, ".jsonl": _read_jsonl, ".txt": _read_txt}
    reader = readers.get(path.suffix.lower())
    if reader is None or (reader is _read_txt and kind != "text"):
        raise DataError(f"{name}:1: {kind} data comes as .jsonl, .json or .parquet (plain text also as .txt)")
    yield from reader(path)


def _decode_text(path):
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: is not UTF-8 text ({error.reason})") from None


def _read_jsonl(path):
    for number, line in enumerate(_decode_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            yield f"{path}:{number}", _Bad(f"is not JSON ({error.msg} at column {error.colno})")


def _read_json(path):
    try:
        rows = json.loads(_decode_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: is not JSON ({error.msg} at column {error.colno})") from None
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield f"{path}:{number}", row


def _read_parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}:1: reading .parquet needs the package pyarrow (pip install pyarrow)") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}:1: is not a parquet file ({error})") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", {name: value for name, value in row.items() if value is not None}


def _read_txt(path):
    text = _decode_text(path)
    mark = END_OF_TEXT if END_OF_TEXT in text else "\n\n"
    line = 1
    for piece in text.split(mark):
        lead = len(piece) - len(piece.lstrip())
        if piece.strip():
            yield f"{path}:{line + piece[:lead].count(chr(10))}", {"text": piece.strip()}
        line += piece.count("\n") + mark.count("\n")


def _read_named(name, split, config):
    try:
        import datasets
    except ImportError:
        if Path(name).suffix or "/" not in name:
            raise DataError(f"{name}: no such file") from None
        hint = "and the package `datasets`, which could know the name, is not installed"
        raise DataError(f"{name}: no such file ({hint})") from None
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        raise DataError(f"{name}:1: no such file, and datasets.load_dataset says: {error}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", {key: value for key, value in row.items() if value is not None}


def _field(raw, name):
    if name not in raw:
        raise _Bad(f"lacks the field `{name}` (has {', '.join(map(repr, raw)) or 'no fields'})")
    return raw[name]


def _messages(name, value):
    for message in value:
        if not (isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
            raise _Bad(f"`{name}` as a list must hold messages {{'role': ..., 'content': ...}} with string values")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _text(name, value):
    if not isinstance(value, str):
        raise _Bad(f"`{name}` must be a string, got {type(value).__name__}")
    if not value.strip():
        raise _Bad(f"`{name}` is empty")
    return value


def _prompt(raw):
    value = _field(raw, "prompt")
    context = raw.get("context")
    if context is not None and not isinstance(context, str):
        raise _Bad(f"`context` must be a string, got {type(context).__name__}")
    if isinstance(value, list):
        messages = _messages("prompt", value)
        if not messages or not any(message["content"].strip() for message in messages):
            raise _Bad("`prompt` is empty")
        if context:
            messages[-1] = {**messages[-1], "content": f"{context}\n\n{messages[-1]['content']}"}
        return messages
    value = _text("prompt", value)
    return f"{context}\n\n{value}" if context else value


def _completion(name, value):
    """A string, or a list with one assistant message (kept as a list: it then ends with the chat's end of turn)."""
    if isinstance(value, list):
        messages = _messages(name, value)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise _Bad(f"`{name}` as a list must hold one message of the role 'assistant'")
        _text(name, messages[0]["content"])
        return messages
    return _text(name, value)


def _check_sft(raw):
    if "messages" in raw:
        value = raw["messages"]
        messages = _messages("messages", value) if isinstance(value, list) else []
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise _Bad("`messages` must hold at least two messages, the last one of the role 'assistant'")
        prompt = _prompt({**raw, "prompt": messages[:-1]})
        return {"prompt": prompt, "completion": _completion("messages", messages[-1:])}
    if "prompt" not in raw and "text" in raw:
        return {"text": _text("text", raw["text"])}
    return {"prompt": _prompt(raw), "completion": _completion("completion", _field(raw, "completion"))}


def _check_ranked(raw):
    if "completions" not in raw and "chosen" in raw:
        row = _check_preference(raw)
        prompt, completions = row["prompt"], [row["chosen"], row["rejected"]]
        raw = {"ranks": [0, 1], **{name: raw[name] for name in ("weight", "margin", "labeler") if name in raw}}
    else:
        prompt, completions = _prompt(raw), _completions(raw)
    name = "ranks" if "ranks" in raw or "scores" not in raw else "scores"
    values, count = _field(raw, name), len(completions)
    try:
        ranked = {"ranks": rankings.ranks_of(name, values, count), **rankings.optional_fields(raw, count)}
    except ValueError as error:
        raise _Bad(str(error)) from None
    return {"prompt": prompt, "completions": completions, **ranked}


def _completions(raw):
    completions = _field(raw, "completions")
    if not isinstance(completions, list):
        raise _Bad(f"`completions` must be a list, got {type(completions).__name__}")
    if len(completions) < 2:
        raise _Bad(f"`completions` must hold at least two completions to rank, got {len(completions)}")
    return [_completion(f"completions[{index}]", value) for index, value in enumerate(completions)]


def _check_preference(raw):
    answers = {name: _completion(name, _field(raw, name)) for name in ("chosen", "rejected")}
    return {"prompt": _prompt(raw), **answers}


def _check_unpaired(raw):
    label = _field(raw, "label")
    if label not in (0, 1):
        raise _Bad(f"`label` must be true (desired) or false, got {label!r}")
    return {**_check_sft({name: raw[name] for name in raw if name != "text"}), "label": bool(label)}


def _check_prompts(raw):
    if "prompt" not in raw and "messages" in raw:
        messages = _messages("messages", raw["messages"]) if isinstance(raw["messages"], list) else []
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        raw = {**raw, "prompt": messages}
    return {"prompt": _prompt(raw)}


def _check_text(raw):
    return {"text": _text("text", _field(raw, "text"))}


_CHECKERS = (_check_sft, _check_ranked, _check_preference, _check_unpaired, _check_prompts, _check_text)
_CHECKS = dict(zip(KINDS, _CHECKERS))


def split_rows(rows, fraction, seed):
    """Hold out a share of the rows, split by prompt: no prompt is on both sides. The same seed gives the same split.

    Args:
        fraction: share of the prompts to hold out, in [0, 1). Above 0, at least one prompt is held out and one kept.
    Returns:
        (train, held_out), both in the order of `rows`.
    Raises:
        ValueError: fraction outside [0, 1), or all rows share one prompt.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: got {fraction}, wants a number in [0, 1)")
    if fraction == 0:
        return list(rows), []
    keys = [json.dumps(row.get("prompt", row.get("text")), sort_keys=True) for row in rows]
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise ValueError(f"rows: got {len(prompts)} distinct prompt, wants at least 2 to hold one out")
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)])
    pairs = list(zip(rows, keys))
    return [row for row, key in pairs if key not in held], [row for row, key in pairs if key in held]


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt: a string, or a list of messages rendered with the tokenizer's chat template.

    BOS comes first if and only if the tokenizer puts it there by itself; an EOS that the tokenizer adds is taken off.
    """
    if not isinstance(prompt, str):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("prompt: got a list of messages, but the tokenizer has no chat template; give a string")
        return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))
    ids = list(tokenizer(prompt, verbose=False).input_ids)
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids.pop()
    return ids


def encode_completion(tokenizer, completion, *, eos=True):
    """Token ids of a completion as it stands: nothing is put before it, and the end token comes once, at the end.

    Args:
        completion: a string, or a list of one assistant message; the latter ends with the chat template's end of turn.
        eos: True adds the end token unless the ids already end with it; False leaves it off.
    """
    is_chat = not isinstance(completion, str)
    text = completion[0]["content"] if is_chat else completion
    ids = _encode_continuation(tokenizer, text)
    if eos:
        end = end_of_turn_id(tokenizer) if is_chat else None
        end = tokenizer.eos_token_id if end is None else end
        if not ids or ids[-1] != end:
            ids.append(end)
    return ids


def _encode_continuation(tokenizer, text):
    """Ids of text that goes on from something. Some tokenizers put a space before any string: then encode it after a
    line break, and take the line break off again."""

    def encode(string):
        return list(tokenizer(string, add_special_tokens=False, verbose=False).input_ids)

    anchor = encode("\n")
    puts_space = len(anchor) > 1 and encode("\n\n")[: len(anchor)] == anchor
    joined = encode("\n" + text) if puts_space else []
    return joined[len(anchor) :] if joined and joined[: len(anchor)] == anchor else encode(text)


def end_of_turn_id(tokenizer):
    """The token that closes an assistant's turn in the tokenizer's chat template, or None where there is no such."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    tail = tokenizer(text[text.rindex("b") + 1 :], add_special_tokens=False).input_ids
    return next((token for token in tail if token in special), None)


def encode_example(tokenizer, row, *, max_length, long_prompts="truncate"):
    """Token ids and labels of one row: the loss counts the completion (and its EOS), not the prompt.

    Args:
        row: {"prompt", "completion"} or {"text"}, of `load_rows`.
        max_length: tokens; what the row may fill.
        long_prompts: "truncate" cuts a too long prompt at its left end (a leading BOS stays); "error" raises.
    Returns:
        {"input_ids": list of int, "labels": list of int with -100 on the prompt}. The last label is the end token.
    Raises:
        ValueError: completion, EOS and one prompt token do not fit into max_length; a long prompt under "error".
    """
    at = f"{row['at']}: " if "at" in row else ""
    is_text = "text" in row
    answer = encode_text(tokenizer, row["text"]) if is_text else encode_completion(tokenizer, row["completion"])
    room = max_length - len(answer)
    if room < (0 if is_text else 1):
        raise ValueError(f"{at}the text to learn fills {len(answer)} tokens, too many for max_length {max_length}")
    prompt = [] if is_text else fit_prompt(tokenizer, encode_prompt(tokenizer, row["prompt"]), room, long_prompts, at)
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def as_text(text):
    """A prompt or completion as one string, for people: messages are joined by line breaks."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def encode_text(tokenizer, text):
    """Token ids of a whole text: as a prompt, and EOS once at the end."""
    ids = encode_prompt(tokenizer, text)
    return ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def fit_prompt(tokenizer, prompt_ids, room, long_prompts="truncate", at=""):
    """Make a prompt fit into `room` tokens by cutting its left end; a leading BOS stays."""
    if len(prompt_ids) <= room:
        return prompt_ids
    if long_prompts == "error":
        raise ValueError(f"{at}the prompt has {len(prompt_ids)} tokens, longer than the {room} that fit")
    if prompt_ids[0] == tokenizer.bos_token_id and room > 1:
        return [prompt_ids[0], *prompt_ids[len(prompt_ids) - room + 1 :]]
    return prompt_ids[len(prompt_ids) - room :]


def pad_batch(sequences, pad_id, side="right"):
    """Pad lists of ids to the longest: (input_ids [B, T] int64, attention_mask [B, T] bool, True = token)."""
    import torch

    if side not in ("left", "right"):
        raise ValueError(f"side: got {side!r}, wants 'left' or 'right'")
    width = max((len(ids) for ids in sequences), default=0)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, ids in enumerate(sequences):
        span = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        input_ids[row, span] = torch.tensor(ids, dtype=torch.long)
        mask[row, span] = True
    return input_ids, mask
