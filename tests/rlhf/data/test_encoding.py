"""Rows as token ids: all stages see the same ids, and a chat's are those of its template's rendering."""

import pytest
import torch

from rlhf import data
from rlhf.data import files
from tests.tiny import word_tokenizer, write_jsonl


def test_bos_comes_only_from_the_tokenizer():
    plain, with_bos = word_tokenizer(), word_tokenizer(bos="<s>")
    assert plain.convert_ids_to_tokens(data.encode_prompt(plain, "the dog")) == ["the", "dog"]
    assert with_bos.convert_ids_to_tokens(data.encode_prompt(with_bos, "the dog")) == ["<s>", "the", "dog"]
    assert with_bos.convert_ids_to_tokens(data.encode_completion(with_bos, "ran up")) == ["ran", "up", "</s>"]


def test_end_token_comes_once():
    tokenizer = word_tokenizer()
    assert data.encode_completion(tokenizer, "ran </s>") == data.encode_completion(tokenizer, "ran")
    assert data.encode_completion(tokenizer, "ran", eos=False) == [tokenizer.convert_tokens_to_ids("ran")]


def test_chat_needs_a_template():
    with pytest.raises(ValueError, match="no chat template"):
        data.encode_prompt(word_tokenizer(), [{"role": "user", "content": "a"}])


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ m.content }} <|end|> {% endfor %}"
)
SYSTEM_FIRST = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    "{% for m in messages %}{{ m.content }} <|end|> {% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "reason"), [(NO_SYSTEM, "no system role"), ("{{ messages[0].no.such }}", "has no attribute")]
)
def test_messages_that_the_template_refuses_are_named(tmp_path, template, reason):
    tokenizer = word_tokenizer(extra=("<|end|>",), chat_template=template)
    talk = [{"role": "system", "content": "be good"}, {"role": "user", "content": "the dog"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": talk}])
    rows = data.load_rows(path, "prompts")
    with pytest.raises(data.DataError, match=rf"rows.jsonl:2: the tokenizer's chat template refuses .*{reason}"):
        data.check_chats(tokenizer, rows)


def test_the_end_of_turn_where_the_template_wants_other_roles():
    """Some want a system message; of one that takes no conversation at all nothing is known, and EOS ends."""
    for template, found in ((SYSTEM_FIRST, "<|end|>"), (NO_SYSTEM, "<|end|>"), ("{{ raise_exception('no') }}", None)):
        tokenizer = word_tokenizer(extra=("<|end|>",), chat_template=template)
        assert data.end_of_turn_id(tokenizer) == (found and tokenizer.convert_tokens_to_ids(found))


def test_the_end_of_turn_is_that_of_the_end_token_that_the_tokenizer_has_now():
    """A run may name another one (--eos_token) for a tokenizer that was looked at before."""
    tokenizer = word_tokenizer(chat_template="{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    for token in ("</s>", "b"):
        tokenizer.eos_token = token
        assert data.end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(token)


CHAT = (
    "{% for m in messages %}<|user|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|user|>{% endif %}"
)


def tokens_of(tokenizer, row, names=("completion",), **options):
    """[(tokens of the prompt, those of each response)] of a row."""
    encoded = data.encode_row(tokenizer, row, names, **{"max_length": 99, **options})
    return [
        (tokenizer.convert_ids_to_tokens(found.prompt), [*map(tokenizer.convert_ids_to_tokens, found.responses)])
        for found in encoded
    ]


def test_trap_34_chat_ends_with_the_end_of_turn():
    tokenizer = word_tokenizer(extra=("<|user|>", "<|end|>"), chat_template=CHAT)
    row = {"prompt": [{"role": "user", "content": "the dog"}], "completion": [{"role": "assistant", "content": "ran"}]}
    prompt = ["<|user|>", "the", "dog", "<|end|>", "<|user|>"]
    assert tokens_of(tokenizer, row) == [(prompt, [["ran", "<|end|>"]])]
    assert tokens_of(tokenizer, {**row, "completion": "ran"}) == [(prompt, [["ran", "<|end|>"]])]
    assert tokens_of(tokenizer, {"prompt": "the dog", "completion": "ran"}) == [(["the", "dog"], [["ran", "</s>"]])]


def test_trap_24_truncation_keeps_the_end_token():
    row = {"prompt": " ".join("abcdefgh"), "completion": "ran up"}
    for bos, kept in ((None, ["f", "g", "h"]), ("<s>", ["<s>", "g", "h"])):
        found = tokens_of(word_tokenizer(bos=bos), row, max_length=6)
        assert found == [(kept, [["ran", "up", "</s>"]])]
    with pytest.raises(data.TooLong, match="the text to learn fills 3 tokens, too many for max_length 3"):
        tokens_of(word_tokenizer(), row, max_length=3)


def test_prompt_longer_than_the_context_is_an_error_when_asked():
    row = {"prompt": " ".join("abcdefgh"), "completion": "ran up"}
    for mode, error in (("error", files.Bad), ("drop", data.TooLong)):
        with pytest.raises(error, match="the prompt has 8 tokens, longer than the 3 that fit"):
            tokens_of(word_tokenizer(), row, max_length=6, long_prompts=mode)


def test_text_is_learned_whole():
    tokenizer = word_tokenizer()
    assert tokens_of(tokenizer, {"text": "the dog"}, max_length=3) == [(["the"], [["dog", "</s>"]])]
    with pytest.raises(data.TooLong, match="too many for max_length 2"):
        tokens_of(tokenizer, {"text": "the dog"}, max_length=2)


@pytest.mark.parametrize("text", [" there was a dog.", "there was", "\n\nThe end", " a  b ", "né ☃"])
def test_completion_goes_on_without_an_extra_space(shared_data, text):
    """A tokenizer that puts a space before every string would make ' there' two spaces and 'there' one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260K-hf")
    ids = data.encode_prompt(tokenizer, "Once upon a time") + data.encode_completion(tokenizer, text, eos=False)
    assert tokenizer.decode(ids) == "Once upon a time" + text


def test_trap_22_sampled_ids_survive_text(shared_data):
    """Ids sampled from a model, decoded and encoded again as a completion, decode to the same text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260K-hf")
    model = AutoModelForCausalLM.from_pretrained(shared_data / "stories260K-hf")
    prompt = data.encode_prompt(tokenizer, "Once upon a time")
    torch.manual_seed(0)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=True)[0].tolist()
    ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
    text = tokenizer.decode(ids)[len("Once upon a time") :]
    assert tokenizer.decode(prompt + data.encode_completion(tokenizer, text, eos=False)) == tokenizer.decode(ids)


def test_pad_batch():
    ids, mask = data.pad_batch([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[True] * 3, [True, False, False]]
    ids, mask = data.pad_batch([[5, 6, 7], [8]], 0, "left")
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[True] * 3, [False, False, True]]
    assert data.pad_batch([], 0)[0].shape == (0, 0)
    with pytest.raises(ValueError, match="side: got 'both'"):
        data.pad_batch([[1]], 0, "both")
