"""Rows into examples: in this process, or by several of them once, after which the ids are in the cache."""

import contextlib
import logging
from dataclasses import dataclass

from . import cache, examples, parallel, rankings, store
from .encoding import TooLong, encode_row
from .examples import Examples, Packer
from .files import Bad, DataError
from .problems import Problems
from .tokens import expect_many_words

logger = logging.getLogger("rlhf")
LARGE = 1024
"""Rows from which on several processes are worth their start."""
SPAN = 128
"""Rows that a process encodes at a time."""


@dataclass(frozen=True)
class Completions:
    """The way in which prompts with completions, and texts, become ids: `way(row)` gives what `encode_row` gives, and
    the completions that are left of a ranking (None: all of them).

    Args:
        names: fields that hold completions, or one field that holds a list of them.
    """

    tokenizer: object
    names: tuple
    max_length: int
    long_prompts: str
    learn_turns: str

    def __call__(self, row):
        try:
            return self._encoded(row), None
        except TooLong as error:
            places = error.fits
            if self.names != ("completions",) or len({row["ranks"][place] for place in places}) < 2:
                raise
        return self._encoded(rankings.keep(row, places)), places

    def _encoded(self, row):
        options = {"long_prompts": self.long_prompts, "learn_turns": self.learn_turns}
        return encode_row(self.tokenizer, row, self.names, max_length=self.max_length, **options)

    @property
    def key(self):
        """A JSON value that names the way, but for the tokenizer."""
        return ["completions", self.names, self.max_length, self.long_prompts, self.learn_turns]


def encode_rows(tokenizer, rows, names, args, *, what):
    """Ids of each row's prompt and completions, as Examples.

    All completions of a row get the same prompt, cut on the left so that the longest completion fits. A row with a
    completion that does not fit is dropped (of a ranking, that completion only, as long as a pair is left). Both are
    counted and told.

    Args:
        names: fields that hold completions, or one field that holds a list of them.
        args: settings, of which max_length and long_prompts must be there.
        what: the name of these rows in messages.
    Raises:
        DataError: rows that cannot be encoded, by file and line.
        ValueError: no row is left.
    """
    learn_turns = getattr(args, "learn_turns", "all")
    way = Completions(tokenizer, tuple(names), args.max_length, args.long_prompts, learn_turns)
    arrays, done = encoded(rows, way, args, what=what)
    problems, limit = Problems(getattr(args, "bad_rows", "error")), f"max_length {args.max_length}"
    for at, reason, _ in done["problems"]:
        problems.add(at, reason)
    problems.settle(len(rows), what)
    if done["cut"]:
        logger.warning("cut %d of %d %s prompts to fit into %s", done["cut"], len(rows), what, limit)
    if done["dropped"]:
        logger.warning("dropped %d of %d %s rows: they do not fit into %s", done["dropped"], len(rows), what, limit)
    found = Examples(rows, arrays)
    if len(rows) and not len(found):
        raise ValueError(f"max_length: got {args.max_length}, too short for every completion of the {what} rows")
    return found


def encoded(rows, way, args, *, what):
    """(Arrays, what was done to rows): {"problems": [[place, reason, number], ...], "cut", "dropped"}.

    Args:
        way: `way(row)` gives a list of `encoding.Encoded` and the completions that are left; it raises Bad, or TooLong.
            `way.tokenizer` and `way.key` are all that it depends on.
        args: settings, of which dataset_num_proc and disable_tqdm are looked at where they are there.
        what: the name of these rows in messages.
    """
    key, is_large = _key(rows, way), len(rows) >= LARGE
    count = parallel.processes(getattr(args, "dataset_num_proc", None)) if is_large else 1
    quiet = {"disable": getattr(args, "disable_tqdm", False) or not is_large}
    spans = [range(start, min(start + SPAN, len(rows))) for start in range(0, len(rows), SPAN)]

    def packers():
        options = {"count": count, "prepare": lambda: expect_many_words(way.tokenizer)}
        found = parallel.in_order(lambda span: _packed(rows, span, way), spans, **options)
        with parallel.progress(len(rows), f"encoding {what} rows", " rows", **quiet) as done:
            for span, packer in zip(spans, found):
                yield packer
                done(len(span))

    if key is None:
        whole = Packer()
        for packer in packers():
            whole.extend(packer)
        return whole.arrays(), vars(whole)

    def make(folder):
        with contextlib.closing(packers()) as parts:
            return examples.write(folder, parts)

    folder, done = cache.entry("ids", key, make)
    return examples.read(folder, done), done


def _packed(rows, span, way):
    packer = Packer()
    for number in span:
        row = rows[number]
        try:
            found, places = way(row)
        except TooLong:
            packer.dropped += 1
        except (Bad, DataError) as error:
            packer.problems.append((row["at"], str(error), number))
        else:
            for prompt, responses, learned, cut in found:
                packer.add(number, prompt, responses, learned, is_text="text" in row, places=places)
                packer.cut += cut
    return packer


def _key(rows, way):
    """What the ids depend on, as a JSON value; None where something of it has no name."""
    rows = store.key_of(rows)
    tokenizer = None if rows is None else tokenizer_key(way.tokenizer)
    return None if tokenizer is None else [rows, tokenizer, way.key, cache.made_by()]


def tokenizer_key(tokenizer):
    """What a tokenizer's ids depend on, as a JSON value; None for one whose code or tables are its own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    splits = getattr(tokenizer, "split_special_tokens", False)
    return [type(tokenizer).__name__, cache.name_of(backend.to_str()), tokenizer.chat_template, special, splits]
