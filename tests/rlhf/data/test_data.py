"""Reading rows and making ids: every bad line is named, and all stages see the same ids."""

import json

import pytest
import torch

from rlhf import data
from tests.tiny import word_tokenizer, write_jsonl


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.jsonl", b"", "rows.jsonl:1: holds no rows"),
        ("rows.jsonl", b"\n\n", "rows.jsonl:1: holds no rows"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "rows.jsonl:2: is not UTF-8"),
        ("rows.json", b'[{"text": "a"},\n{]', "rows.json:2: is not JSON"),
        ("rows.json", b"[]", "rows.json:1: holds no rows"),
        ("rows.xml", b"<text>a</text>", "comes as .jsonl"),
    ],
)
def test_bad_file(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(data.DataError, match=reason.replace(".", r"\.")):
        data.load_rows(tmp_path / name, "text")


def test_missing_file_and_folder_without_the_split(tmp_path):
    with pytest.raises(data.DataError, match="no such file"):
        data.load_rows(tmp_path / "missing.jsonl", "sft")
    with pytest.raises(data.DataError, match="holds no rows of the split 'train'; it is empty"):
        data.load_rows(tmp_path, "sft")
    with pytest.raises(ValueError, match="kind: got 'sftt'"):
        data.load_rows(tmp_path, "sftt")


def test_plain_text_needs_the_kind_text(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(data.DataError, match="sft data comes as"):
        data.load_rows(tmp_path / "a.txt", "sft")


def test_file_forms_agree(tmp_path):
    rows = [{"text": "a b"}, {"text": "c"}]
    write_jsonl(tmp_path / "train.jsonl", ["", json.dumps(rows[0]), "", json.dumps(rows[1])])
    (tmp_path / "rows.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    (tmp_path / "rows.txt").write_text("a b\n<|endoftext|>\n\nc\n", encoding="utf-8")
    (tmp_path / "blank.txt").write_text("a b\n\nc\n", encoding="utf-8")
    for name in ("train.jsonl", "rows.json", "rows.txt", "blank.txt", "."):
        assert [row["text"] for row in data.load_rows(tmp_path / name, "text")] == ["a b", "c"]
    assert [row["at"] for row in data.load_rows(tmp_path / "rows.txt", "text")] == [
        f"{tmp_path}/rows.txt:1",
        f"{tmp_path}/rows.txt:4",
    ]


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the optional package pyarrow")
    import pyarrow

    rows = [
        {"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1]},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    columns = {name: [row.get(name) for row in rows] for name in {**rows[0], **rows[1]}}
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    assert [row["ranks"] for row in data.load_rows(tmp_path / "rows.parquet", "ranked")] == [[0, 1], [0, 1]]
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(data.DataError, match="is not a whole parquet file"):
        data.load_rows(tmp_path / "bad.parquet", "ranked")


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


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_plain_text(tmp_path, end):
    (tmp_path / "t.txt").write_bytes(end.join(["one", "", "two", "lines", "", "three"]).encode())
    rows = data.load_rows(tmp_path / "t.txt", "text")
    assert [row["text"] for row in rows] == ["one", "two\nlines", "three"]
    assert [row["at"].rpartition(":")[2] for row in rows] == ["1", "3", "6"]


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


CHAT = (
    "{% for m in messages %}<|user|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def test_trap_34_chat_ends_with_the_end_of_turn():
    tokenizer = word_tokenizer(extra=("<|user|>", "<|bot|>", "<|end|>"), chat_template=CHAT)
    prompt, answer = [{"role": "user", "content": "the dog"}], [{"role": "assistant", "content": "ran"}]
    tokens = tokenizer.convert_ids_to_tokens(data.encode_prompt(tokenizer, prompt))
    assert tokens == ["<|user|>", "the", "dog", "<|end|>", "<|bot|>"]
    assert tokenizer.convert_ids_to_tokens(data.encode_completion(tokenizer, answer)) == ["ran", "<|end|>"]
    assert tokenizer.convert_ids_to_tokens(data.encode_completion(tokenizer, "ran")) == ["ran", "</s>"]


def test_trap_24_loss_mask_golden():
    tokenizer = word_tokenizer()
    the, dog, ran, up, eos = tokenizer.convert_tokens_to_ids(["the", "dog", "ran", "up", "</s>"])
    example = data.encode_example(tokenizer, {"prompt": "the dog", "completion": "ran up"}, max_length=8)
    assert example == {"input_ids": [the, dog, ran, up, eos], "labels": [-100, -100, ran, up, eos]}


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_trap_24_truncation_keeps_the_end_token(bos):
    tokenizer = word_tokenizer(bos=bos)
    row = {"prompt": " ".join("abcdefgh"), "completion": "ran up", "at": "rows.jsonl:3"}
    kept = ["<s>", "g", "h"] if bos else ["f", "g", "h"]
    example = data.encode_example(tokenizer, row, max_length=6)
    assert tokenizer.convert_ids_to_tokens(example["input_ids"]) == [*kept, "ran", "up", "</s>"]
    assert example["labels"][-1] == tokenizer.eos_token_id and example["labels"][:3] == [-100] * 3
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: the text to learn fills 3 tokens, too many for max_length 3"):
        data.encode_example(tokenizer, row, max_length=3)


def test_prompt_longer_than_the_context_is_an_error_when_asked():
    row = {"prompt": " ".join("abcdefgh"), "completion": "ran up", "at": "rows.jsonl:3"}
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: the prompt has 8 tokens, longer than the 3 that fit"):
        data.encode_example(word_tokenizer(), row, max_length=6, long_prompts="error")


def test_text_is_learned_whole():
    tokenizer = word_tokenizer()
    example = data.encode_example(tokenizer, {"text": "the dog"}, max_length=3)
    assert example["input_ids"] == example["labels"] and example["labels"][-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="too many for max_length 2"):
        data.encode_example(tokenizer, {"text": "the dog"}, max_length=2)


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


def test_real_data_loads(shared_data):
    rankings = data.load_rows(shared_data / "rankings.jsonl", "ranked")
    assert len(rankings) == 562 and {len(row["ranks"]) for row in rankings} >= {2, 4, 9}
    assert len(data.load_rows(shared_data / "demonstrations.jsonl", "sft")) == 779
    assert len(data.load_rows(shared_data / "tinystories_sample.txt", "text")) > 2000
