"""Texts as token ids, and where tokens lie in them; as transformers' tokenizers give them, with less ado."""

import functools
import itertools
import re
import weakref
from bisect import bisect_left, bisect_right

WORDS = 100_000
"""Words whose tokens are kept in a process that encodes much: a few hundred bytes each."""
NEAR, KEPT = 64, 10_000
"""Characters up to which the start of a piece is tokenised by itself, to see where its tokens end; short texts kept."""


def ids_of(tokenizer, texts, *, add_special_tokens=False):
    """`tokenizer(text).input_ids` of each text."""
    backend = _backend(tokenizer)
    if backend is None:
        return [list(ids) for ids in tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False).input_ids]
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]


def expect_many_words(tokenizer):
    """Let a tokenizer keep the tokens of more words than usual, in a process that encodes a large part of some data."""
    backend = _backend(tokenizer)
    if backend is not None and hasattr(backend.model, "_resize_cache"):
        backend.model._resize_cache(WORDS)


def _backend(tokenizer):
    """What a tokenizer does nothing but ask for the ids of a text; None where it does more."""
    if not _only_asks(type(tokenizer)) or "_encode_plus" in vars(tokenizer):
        return None
    backend = tokenizer.backend_tokenizer
    is_set = backend.truncation is not None or backend.padding is not None or backend.encode_special_tokens
    return None if is_set or tokenizer.split_special_tokens else backend


@functools.cache
def _only_asks(kind):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    return (
        issubclass(kind, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
        and not hasattr(kind, "_switch_to_input_mode")
        and hasattr(Tokenizer, "encode_batch_fast")
    )


class Splitter:
    """Cuts texts of a tokenizer into pieces that it tokenises each by itself, and keeps the tokens of short ones.

    Args:
        tokens: before which texts part, whatever stands there; thousands as they may be, most places of a text are
            passed by at once, as none of them begins with what stands there.
    """

    def __init__(self, tokenizer, tokens):
        self.tokenizer, self.unknown, self.kept = weakref.ref(tokenizer), tokenizer.unk_token_id, {}
        first = "".join(sorted({re.escape(token[0]) for token in tokens}))
        self.token = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self.before = re.compile(f"(?=[{first}])(?={self.token.pattern})" if tokens else "(?!)")

    def pieces(self, text):
        """The text in pieces, of which all but the first begin with one of the tokens."""
        return [piece for piece in self.before.split(text) if piece]

    def add_ids(self, texts, known):
        """Put the ids of texts into a dict {text: (ids, offsets or None)} where it lacks them."""
        kept = self.kept
        known.update((text, kept[text]) for text in texts if text in kept and text not in known)
        new = [text for text in texts if text not in known]
        if not new:
            return
        for text, ids in zip(new, ids_of(self.tokenizer(), new)):
            known[text] = (ids, None)
            if len(text) <= NEAR and len(kept) < KEPT:
                kept[text] = (ids, None)

    def offsets(self, piece, known):
        """Where the tokens of a piece begin and end; its first one may have taken in the space behind it, which is not
        told."""
        if known.get(piece, (None, None))[1] is None:
            found = self.tokenizer()(piece, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
            offsets = list(found.offset_mapping)
            if offsets and self.token.match(piece):
                offsets[0] = (0, len(piece[: offsets[0][1]].rstrip()))
            known[piece] = (list(found.input_ids), offsets)
        return known[piece][1]


class Text:
    """A rendered text, its ids, and where they lie in it.

    A special token parts what stands before it from what follows, whatever the tokenizer, so the pieces are tokenised
    one by one, and those that several texts of a row have in common once.

    Args:
        known: pieces with their ids, which is added to.
        cuts: lengths of the text that `within` and `begun` will be asked for.
    """

    def __init__(self, splitter, text, known, cuts=()):
        self.splitter, self.pieces, self.known = splitter, splitter.pieces(text), known
        self.begins = [0, *itertools.accumulate(map(len, self.pieces))]
        wanted = dict.fromkeys(self.pieces)
        for piece, place in map(self._inside, cuts):
            if 0 < place <= NEAR:
                wanted[piece[:place]] = None
            elif place:
                splitter.offsets(piece, known)
        splitter.add_ids(wanted, known)
        parts = [known[piece][0] for piece in self.pieces]
        self.firsts = [0, *itertools.accumulate(map(len, parts))]
        self.ids = list(itertools.chain.from_iterable(parts))

    def within(self, length):
        """How many tokens lie wholly in the first `length` characters."""
        return self._tokens(length)[0]

    def begun(self, length):
        """How many tokens begin there, of which the last may reach beyond."""
        return self._tokens(length)[1]

    def _number(self, length):
        return min(bisect_right(self.begins, length), len(self.pieces)) - 1

    def _inside(self, length):
        """(piece, place) where a length ends inside a piece; ("", 0) where it ends with one."""
        if length in (0, self.begins[-1]):
            return "", 0
        number = self._number(length)
        return self.pieces[number], length - self.begins[number]

    def _tokens(self, length):
        piece, place = self._inside(length)
        if not place:
            count = self.firsts[self.begins.index(length)]
            return count, count
        before = self.firsts[self._number(length)]
        within, begun = self._of_piece(piece, place)
        return before + within, before + begun

    def _of_piece(self, piece, place):
        ids, offsets = self.known[piece]
        start, _ = self.known.get(piece[:place], ((), None))
        if offsets is None and start and ids[: len(start)] == start and self.splitter.unknown not in start:
            return len(start), len(start)  # the same tokens stand for the same characters
        starts, ends = zip(*self.splitter.offsets(piece, self.known))
        within = bisect_right(ends, place)
        return within, max(bisect_left(starts, place), within)


class SlowText:
    """A text of a tokenizer that does not tell where its tokens lie."""

    def __init__(self, tokenizer, text):
        self.tokenizer, self.text = tokenizer, text
        (self.ids,) = ids_of(tokenizer, [text])

    def within(self, length):
        """How many tokens of the text are those of its first `length` characters."""
        start = ids_of(self.tokenizer, [self.text[:length]])[0]
        same = (index for index, (token, other) in enumerate(zip(self.ids, start)) if token != other)
        return next(same, min(len(self.ids), len(start)))

    begun = within
