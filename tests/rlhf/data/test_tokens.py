"""Ids are those of transformers' tokenizers, and a place in a text is where the tokens' own offsets say."""

import gc
import time
import weakref

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf.data import tokens
from rlhf.data.tokens import Splitter, Text, ids_of
from tests.tiny import word_tokenizer

SPECIAL = ["<s>", "</s>", "<|user|>", "<|answer|>"]
TEXTS = [
    "<|user|>\nHello, is it é or é?  No\n\n</s><|answer|>\n Yes: 12 cats.\n</s>",
    "<|answer|>aab ab</s>\n<|answer|>\n\n\n ab  ba</s>",
    "no special token at all, but  two  spaces",
    "<|user|>" + "long before the place that is asked for, " * 4 + "and on</s>",
    "</s>",
]


def bpe(*, metaspace=False, unk=None, rstrip=False):
    """A BPE of single characters and a few merges: byte-level, or with a mark for spaces and an unknown token."""
    space = "▁" if metaspace else "Ġ"
    merges = [
        ("a", "b"),
        (space, "ab"),
        (space, "a"),
        ("c", "a"),
        ("ca", "t"),
        (space, "cat"),
        ("Ċ", "Ċ"),
        (space, space),
    ]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if not metaspace else [*"abcdefghilnorstuwy?:,.\n", space]
    words = [*([unk] if unk else []), *SPECIAL, *letters, *(first + second for first, second in merges)]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    merges = [pair for pair in merges if set(pair) <= set(vocabulary)]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unk, fuse_unk=bool(unk)))
    if metaspace:
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", space)])
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(split=False), decoders.Metaspace()
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.add_special_tokens([AddedToken(token, rstrip=rstrip, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unk, eos_token="</s>", pad_token="</s>")


TOKENIZERS = {
    "byte-level": bpe,
    "tokens that take in space": lambda: bpe(rstrip=True),
    "unknown tokens": lambda: bpe(metaspace=True, unk="<unk>"),
    "words": lambda: word_tokenizer(extra=("<|user|>", "<|answer|>")),
    "words with bos": lambda: word_tokenizer(bos="<s>", extra=("<|user|>", "<|answer|>")),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("special", [True, False])
def test_ids_are_those_of_the_tokenizer(name, special):
    tokenizer = TOKENIZERS[name]()
    expected = [list(tokenizer(text, add_special_tokens=special).input_ids) for text in TEXTS]
    assert ids_of(tokenizer, TEXTS, add_special_tokens=special) == expected
    assert tokens._backend(tokenizer) is not None
    tokenizer.backend_tokenizer.enable_truncation(3)  # as a call with truncation leaves it
    assert ids_of(tokenizer, TEXTS, add_special_tokens=special) == expected


def test_a_tokenizer_that_does_more_is_asked_itself():
    class Shouting(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            return super().__call__([one.upper() for one in text], **options)

    plain = word_tokenizer()
    shouting = Shouting(
        tokenizer_object=plain.backend_tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
    assert ids_of(plain, ["a b"]) != ids_of(shouting, ["a b"]) == [[plain.unk_token_id] * 2]
    split = word_tokenizer()
    split.split_special_tokens = True
    assert tokens._backend(split) is None and ids_of(split, ["</s> a"]) == [split("</s> a").input_ids]


def own_end(text, start, end):
    """Where a token ends; a special one may take in the space behind it, which is not its own."""
    return start + len(text[start:end].rstrip()) if text.startswith(tuple(SPECIAL), start) else end


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_places_are_those_of_the_offsets(name, given):
    """Of every place in every text; whether it was named before, so that no offsets were asked for, or not."""
    tokenizer = TOKENIZERS[name]()
    splitter = Splitter(tokenizer, [token for token in SPECIAL if token in tokenizer.get_vocab()])
    for text in TEXTS:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = [(start, own_end(text, start, end)) for start, end in found.offset_mapping]
        for place in range(len(text) + 1):
            known = {}
            made = Text(splitter, text, known, [place] if given else [])
            assert made.ids == list(found.input_ids)
            within = sum(end <= place for _, end in offsets)
            begun = max(within, sum(start < place for start, _ in offsets))
            assert (made.within(place), made.begun(place)) == (within, begun), (text[:place], text[place:])
            again = Text(splitter, text, known, [place])
            assert (again.within(place), again.begun(place)) == (within, begun)


def test_texts_part_before_tokens_of_which_there_are_thousands():
    tokens = [f"<unused{number}>" for number in range(6000)] + ["[IMG]", "]^-\\"]
    splitter = Splitter(word_tokenizer(), tokens)
    text = "a <unused> [b] <unused7><unused4321> c]^ [IMG]]^-\\ d" + " e" * 1000
    pieces = ["a <unused> [b] ", "<unused7>", "<unused4321> c]^ ", "[IMG]", "]^-\\ d" + " e" * 1000]
    assert splitter.pieces(text) == pieces and Splitter(word_tokenizer(), []).pieces(text) == [text]
    start = time.process_time()
    for _ in range(20):
        splitter.pieces(text)
    assert time.process_time() - start < 0.2  # 30 times that where each place is held against all tokens


def test_short_texts_are_tokenised_once_and_the_tokenizer_may_go():
    tokenizer = bpe()
    splitter, asked = Splitter(tokenizer, SPECIAL), []
    tokenizer_calls = tokens.ids_of

    def counted(tokenizer, texts, **options):
        asked.extend(texts)
        return tokenizer_calls(tokenizer, texts, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokens, "ids_of", counted)
        for answer in ("ab", "cat" * 100, "ab"):
            Text(splitter, f"<|user|>a</s><|answer|>{answer}</s>", {}, [8, 23])
    assert sorted(asked) == sorted(
        ["<|user|>a", "</s>", "<|answer|>", "<|answer|>ab", "<|answer|>" + "cat" * 100, "<|user|>"]
    )
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None
