"""Rows as token ids, four bytes a token, in arrays that index like a list of dicts."""

import hashlib
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import numpy

from . import rankings, store
from .encoding import TooLong, encode_row
from .files import Bad
from .problems import Problems

logger = logging.getLogger("rlhf")


class Examples(Sequence):
    """Encoded rows: `examples[i]` is {"prompt": ids, "responses": [ids, ...], "row": row}, made when it is asked for.

    Where some token of a response is read and not learned, there is "learned" too: for each response None (all of it
    is learned) or a list of bool. Further entries come from `add`.

    Attributes:
        lengths: [E] int64, tokens of each example's prompt and its longest response.
        prompt_lengths: [E] int64.
        is_text: [E] bool, True = a plain text, whose first token is the prompt.
    """

    def __init__(self, rows, arrays):
        self.rows, self.arrays, self.columns = rows, arrays, {}
        sizes, prompts = arrays.sizes.copy(), arrays.first[:-1]
        self.prompt_lengths, self.is_text = sizes[prompts], arrays.is_text
        sizes[prompts] = 0
        self.lengths = self.prompt_lengths + (numpy.maximum.reduceat(sizes, prompts) if len(prompts) else 0)

    @classmethod
    def of(cls, examples):
        """Examples from dicts of the same form; what are Examples already stay as they are."""
        if isinstance(examples, cls):
            return examples
        rows, packer = [], Packer()
        for number, example in enumerate(examples):
            rows.append(example.get("row", {}))
            options = {"is_text": "text" in rows[-1]}
            packer.add(number, example["prompt"], example["responses"], example.get("learned"), **options)
        return cls(rows, packer.arrays())

    def add(self, name, values):
        """Give every example an entry `name`: `values[i]`, of an array with one row an example, as a list."""
        values = numpy.asarray(values)
        if len(values) != len(self):
            raise ValueError(f"{name}: got {len(values)} values for {len(self)} examples")
        self.columns[name] = values

    def __len__(self):
        return len(self.arrays.source)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index = int(index) % len(self)
        prompt, *responses = (self._stored(sequence) for sequence in range(*self.arrays.first[index : index + 2]))
        example = {"prompt": prompt.tolist(), "responses": [(ids ^ (ids >> 31)).tolist() for ids in responses]}
        if any((ids < 0).any() for ids in responses):
            example["learned"] = [(ids >= 0).tolist() if (ids < 0).any() else None for ids in responses]
        columns = {name: values[index].tolist() for name, values in self.columns.items()}
        return {**example, "row": self.row(index), **columns}

    def _stored(self, sequence):
        start = self.arrays.starts[sequence]
        return self.arrays.tokens[start : start + self.arrays.sizes[sequence]]

    def row(self, index):
        """The row of an example; of a ranking, with only the completions that the example has."""
        row, places = self.rows[self.arrays.source[index]], self.arrays.places
        if places is None:
            return row
        start, end = self.arrays.first[index : index + 2]
        kept = places[start + 1 : end].tolist()
        return row if kept == list(range(len(row["completions"]))) else rankings.keep(row, kept)

    @property
    def largest_id(self):
        """The largest token id of all, -1 without any."""
        tokens = self.arrays.tokens
        return int((tokens ^ (tokens >> 31)).max()) if len(tokens) else -1

    def digest(self):
        """A name of the ids and of what the rows say; where they lie does not count."""
        arrays, found = self.arrays, hashlib.sha256()
        places = () if arrays.places is None else (arrays.places,)
        for values in (arrays.tokens, arrays.starts, arrays.sizes, arrays.first, *places):
            found.update(memoryview(values))
        found.update(store.digest(store.Mapped(self.rows.__getitem__, arrays.source)))
        return found.digest()

    def pairs(self, *, ties=False):
        """Every pair of every ranking as an example of its own, of the weight of its ranking; the ids are shared.

        Args:
            ties: True makes examples of the tied pairs too.
        """
        picked, source = array("q"), array("q")
        for number, first in enumerate(self.arrays.first[:-1].tolist()):
            ranks = self.row(number)["ranks"]
            tied = [pair for pair in combinations(range(len(ranks)), 2) if ranks[pair[0]] == ranks[pair[1]]]
            for pair in rankings.decided_pairs(ranks) + (tied if ties else []):
                picked.extend([first, *(first + 1 + place for place in pair)])
                source.append(number)
        picked, source = numpy.asarray(picked), numpy.asarray(source)
        places = self.arrays.places
        if places is None:
            first, counts = self.arrays.first[:-1], numpy.diff(self.arrays.first)
            places = numpy.arange(len(self.arrays.sizes)) - 1 - numpy.repeat(first, counts)
        arrays = self.arrays._replace(
            starts=self.arrays.starts[picked],
            sizes=self.arrays.sizes[picked],
            first=numpy.arange(0, len(picked) + 1, 3),
            source=self.arrays.source[source],
            is_text=self.is_text[source],
            places=places[picked],
        )
        return Examples(self.rows, arrays)


class Arrays(NamedTuple):
    """What `Examples` are made of: E examples of a prompt and its responses, Q sequences together, N tokens."""

    tokens: numpy.ndarray  # [N] int32; ~id where it is read and not learned
    starts: numpy.ndarray  # [Q] int64, sequence q is tokens[starts[q] : starts[q] + sizes[q]]
    sizes: numpy.ndarray  # [Q] int64
    first: numpy.ndarray  # [E+1] int64, example e has the sequences first[e] (its prompt) up to first[e+1]
    source: numpy.ndarray  # [E] int64, the number of its row
    is_text: numpy.ndarray  # [E] bool
    places: numpy.ndarray | None  # [Q] int64, which completion of its row a sequence is; None where rows kept them all


class Packer:
    """Puts examples one by one into arrays."""

    def __init__(self):
        self.tokens, self.sizes, self.counts = array("i"), array("q"), array("q")
        self.source, self.is_text, self.places = array("q"), array("b"), array("q")
        self.has_lost = False

    def add(self, source, prompt, responses, learned=None, *, is_text=False, places=None):
        """Add an example of row number `source`; `places`: the responses that are left of a ranking, None = all."""
        self.tokens.extend(prompt)
        for number, ids in enumerate(responses):
            mask = learned[number] if learned else None
            self.tokens.extend(ids if mask is None else [t if known else ~t for t, known in zip(ids, mask)])
        self.sizes.extend([len(prompt), *map(len, responses)])
        self.counts.append(1 + len(responses))
        self.source.append(source)
        self.is_text.append(is_text)
        self.places.extend([-1, *(range(len(responses)) if places is None else places)])
        self.has_lost = self.has_lost or places is not None

    def arrays(self):
        """The Arrays of what was added."""
        sizes = numpy.asarray(self.sizes)
        return Arrays(
            numpy.asarray(self.tokens),
            sizes.cumsum() - sizes,
            sizes,
            numpy.concatenate([[0], self.counts]).astype(numpy.int64).cumsum(),
            numpy.asarray(self.source),
            numpy.asarray(self.is_text).astype(bool),
            numpy.asarray(self.places) if self.has_lost else None,
        )


@dataclass
class Encoder:
    """How rows become examples; `encode` collects them in `packer`, and counts what it does to rows that are too long.

    Args:
        names: fields that hold completions, or one field that holds a list of them.
    """

    tokenizer: object
    names: tuple
    options: dict
    packer: Packer = field(default_factory=Packer)
    problems: list = field(default_factory=list)
    cut: int = 0
    dropped: int = 0

    def encode(self, number, row):
        """Add what row `number` gives, or note why it gives nothing."""
        try:
            found, places = self._fitted(row)
        except TooLong:
            self.dropped += 1
            return
        except Bad as error:
            self.problems.append((row["at"], str(error)))
            return
        for prompt, responses, learned, cut in found:
            self.packer.add(number, prompt, responses, learned, is_text="text" in row, places=places)
            self.cut += cut

    def _fitted(self, row):
        """(list of Encoded, the completions that are left of a ranking or None): those that do not fit go, down to a
        last pair."""
        try:
            return encode_row(self.tokenizer, row, self.names, **self.options), None
        except TooLong as error:
            places = error.fits
            if self.names != ("completions",) or len({row["ranks"][place] for place in places}) < 2:
                raise
        return encode_row(self.tokenizer, rankings.keep(row, places), self.names, **self.options), places


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
    options = {"max_length": args.max_length, "long_prompts": args.long_prompts}
    options["learn_turns"] = getattr(args, "learn_turns", "all")
    encoder = Encoder(tokenizer, tuple(names), options)
    for number, row in enumerate(rows):
        encoder.encode(number, row)
    problems = Problems(getattr(args, "bad_rows", "error"))
    for at, reason in encoder.problems:
        problems.add(at, reason)
    problems.settle(len(rows))
    limit = f"max_length {args.max_length}"
    if encoder.cut:
        logger.warning("cut the left end of %d of %d %s prompts to fit into %s", encoder.cut, len(rows), what, limit)
    if encoder.dropped:
        logger.warning("dropped %d of %d %s rows: they do not fit into %s", encoder.dropped, len(rows), what, limit)
    examples = Examples(rows, encoder.packer.arrays())
    if len(rows) and not len(examples):
        raise ValueError(f"max_length: got {args.max_length}, too short for every completion of the {what} rows")
    return examples
