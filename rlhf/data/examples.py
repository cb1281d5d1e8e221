"""Rows as token ids, four bytes a token, in arrays that index like a list of dicts."""

import hashlib
from array import array
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy

from ..disk import write_all, writing
from . import rankings, store

TOKENS = "tokens.bin"
SIZES, COUNTS, SOURCE, IS_TEXT, PLACES = "sizes.npy", "counts.npy", "source.npy", "is_text.npy", "places.npy"


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
        return self.arrays.tokens.read(start, start + self.arrays.sizes[sequence])

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
        return self.arrays.tokens.largest

    def digest(self):
        """A name of the ids and of what the rows say; where they lie does not count."""
        arrays, found = self.arrays, hashlib.sha256(self.arrays.tokens.digest())
        for values in (arrays.starts, arrays.sizes, arrays.first, arrays.places):
            found.update(b"" if values is None else memoryview(numpy.ascontiguousarray(values)))
        found.update(store.digest(store.take(self.rows, arrays.source)))
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


class Tokens:
    """N token ids as int32 in memory; ~id where a token is read and not learned."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def read(self, start, end):
        return self.values[start:end]

    def with_more(self, ids):
        """These tokens in memory, and `ids` behind them."""
        return Tokens(numpy.concatenate([self.read(0, len(self)), numpy.asarray(ids, numpy.int32)]))

    @property
    def largest(self):
        return largest(self.values)

    def digest(self):
        return hashlib.sha256(self.values).digest()


class TokenFile(Tokens):
    """Token ids in a file whose largest id and digest are known."""

    largest = None

    def __init__(self, path, largest, digest):
        self.blob, self.largest, self._digest = store.Blob(path), largest, digest

    def __len__(self):
        return self.blob.path.stat().st_size // 4

    def read(self, start, end):
        return numpy.frombuffer(self.blob.read(4 * int(start), 4 * int(end)), numpy.int32)

    def digest(self):
        return bytes.fromhex(self._digest)


def largest(values):
    """The largest token id of stored ones, -1 without any."""
    return int((values ^ (values >> 31)).max()) if len(values) else -1


class Arrays(NamedTuple):
    """What `Examples` are made of: E examples of a prompt and its responses, Q sequences together."""

    tokens: Tokens
    starts: numpy.ndarray  # [Q] int64, sequence q has the tokens starts[q] up to starts[q] + sizes[q]
    sizes: numpy.ndarray  # [Q] int64
    first: numpy.ndarray  # [E+1] int64, example e has the sequences first[e] (its prompt) up to first[e+1]
    source: numpy.ndarray  # [E] int64, the number of its row
    is_text: numpy.ndarray  # [E] bool
    places: numpy.ndarray | None  # [Q] int64, which completion of its row a sequence is; None where rows kept them all


class Packer:
    """Puts examples one by one into arrays, and counts what was done to rows on the way."""

    def __init__(self):
        self.tokens, self.sizes, self.counts = array("i"), array("q"), array("q")
        self.source, self.is_text, self.places = array("q"), array("b"), array("q")
        self.has_lost = False
        self.problems, self.cut, self.dropped = [], 0, 0

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

    def extend(self, other, *, tokens=True):
        """Add what another one has, behind this one's."""
        for name in ("tokens", "sizes", "counts", "source", "is_text", "places")[not tokens :]:
            getattr(self, name).extend(getattr(other, name))
        self.has_lost = self.has_lost or other.has_lost
        self.problems += other.problems
        self.cut += other.cut
        self.dropped += other.dropped

    def arrays(self, tokens=None):
        """The Arrays of what was added; `tokens`: where the tokens are instead."""
        return _arrays(
            Tokens(numpy.asarray(self.tokens)) if tokens is None else tokens,
            numpy.asarray(self.sizes),
            numpy.asarray(self.counts),
            numpy.asarray(self.source),
            numpy.asarray(self.is_text).astype(bool),
            numpy.asarray(self.places) if self.has_lost else None,
        )


def _arrays(tokens, sizes, counts, source, is_text, places):
    first = numpy.concatenate([[0], counts]).astype(numpy.int64).cumsum()
    return Arrays(tokens, sizes.cumsum() - sizes, sizes, first, source, is_text, places)


def write(folder, packers) -> dict:
    """Write what packers hold, in their order, into a folder for `read`.

    Returns:
        {"largest", "digest"} of the tokens, and the packers' "problems", "cut" and "dropped".
    Raises:
        WriteError: names the file.
    """
    whole, found, most = Packer(), hashlib.sha256(), -1
    path = Path(folder) / TOKENS
    with writing(path):
        file = open(path, "wb", buffering=0)  # noqa: SIM115 - an error of the packers, below, is none of the file
    with file:
        for packer in packers:
            found.update(packer.tokens)
            most = max(most, largest(numpy.asarray(packer.tokens)))
            with writing(path):
                write_all(file, memoryview(packer.tokens).cast("B"))
            whole.extend(packer, tokens=False)
    named = {SIZES: whole.sizes, COUNTS: whole.counts, SOURCE: whole.source, IS_TEXT: whole.is_text}
    for name, values in {**named, **({PLACES: whole.places} if whole.has_lost else {})}.items():
        with writing(Path(folder) / name):
            numpy.save(Path(folder) / name, numpy.asarray(values))
    counted = {"problems": whole.problems, "cut": whole.cut, "dropped": whole.dropped}
    return {"largest": most, "digest": found.hexdigest(), **counted}


def read(folder, said) -> Arrays:
    """The Arrays that `write` put into a folder; `said` is what it returned."""
    folder = Path(folder)
    sizes, counts, source, is_text = (numpy.load(folder / name) for name in (SIZES, COUNTS, SOURCE, IS_TEXT))
    places = numpy.load(folder / PLACES) if (folder / PLACES).exists() else None
    tokens = TokenFile(folder / TOKENS, said["largest"], said["digest"])
    return _arrays(tokens, sizes, counts, source, is_text.astype(bool), places)
