"""A chat template for a tokenizer without one: chatml, or a file."""

import json

import pytest

from rlhf import data
from rlhf.data.files import Bad
from tests.rlhf.data.chat_families import CALL, CHATML, FIND, message, tokenizer_of
from tests.tiny import word_tokenizer

ASK, TELL = message("user", "the dog"), message("assistant", "ran up")


def test_chatml_adds_its_tokens():
    tokenizer = word_tokenizer()
    before = len(tokenizer)
    assert data.with_chat_template(tokenizer, "chatml") is tokenizer
    assert tokenizer.convert_ids_to_tokens([before, before + 1]) == ["<|im_start|>", "<|im_end|>"]
    assert len(tokenizer) == before + 2 and data.end_of_turn_ids(tokenizer) == [before + 1]
    assert tokenizer.decode([before, before + 1], skip_special_tokens=True) == ""
    data.with_chat_template(tokenizer, "chatml")
    assert len(tokenizer) == before + 2


def test_chatml_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = data.with_chat_template(word_tokenizer(), "chatml")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    row = {"prompt": data.Chat([ASK]), "completion": [TELL]}
    assert data.encode_row(again, row, ("completion",), max_length=99) == data.encode_row(
        tokenizer, row, ("completion",), max_length=99
    )


def text_of(*messages, tools=None, **options):
    tokenizer = tokenizer_of("qwen2.5")
    template = data.with_chat_template(word_tokenizer(), "chatml").chat_template
    return tokenizer.apply_chat_template(list(messages), tools, chat_template=template, tokenize=False, **options)


def test_chatml_as_the_public_one_renders_it():
    plain = tokenizer_of("chatml")
    for messages in ([ASK], [ASK, TELL], [message("system", "s"), ASK, TELL, ASK]):
        for asks in (True, False):
            theirs = plain.apply_chat_template(
                messages, chat_template=CHATML, tokenize=False, add_generation_prompt=asks
            )
            assert text_of(*messages, add_generation_prompt=asks) == theirs


def test_chatml_writes_tools_calls_and_thoughts():
    call = message("assistant", None, tool_calls=[CALL])
    thought = {**TELL, "reasoning_content": "up?"}
    text = text_of(message("system", "s"), ASK, call, message("tool", "rose"), thought, tools=[FIND])
    assert text.startswith("<|im_start|>system\ns\n\n") and text.count("<|im_start|>system") == 1
    assert json.dumps(FIND) in text
    assert json.loads(text.split("<tool_call>\n")[1].split("\n</tool_call><|im_end|>")[0]) == CALL["function"]
    assert text.endswith("<|im_start|>assistant\n<think>\nup?\n</think>\n\nran up<|im_end|>\n")
    assert "<|im_start|>tool\nrose<|im_end|>" in text


TEMPLATE = "{% for m in messages %}{{ m.content }} <|im_end|> {% endfor %}"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("t.jinja", TEMPLATE),
        ("t.txt", TEMPLATE),
        ("tokenizer_config.json", json.dumps({"eos_token": "</s>", "chat_template": TEMPLATE})),
        ("chat_template.json", json.dumps({"chat_template": TEMPLATE})),
        ("several.json", json.dumps({"chat_template": [{"name": "default", "template": TEMPLATE}]})),
    ],
)
def test_a_file_with_a_template(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    tokenizer = data.with_chat_template(word_tokenizer(), str(tmp_path / file))
    tokens = tokenizer.convert_ids_to_tokens(data.encode_prompt(tokenizer, data.Chat([ASK])))
    assert tokens == ["the", "dog", "<|im_end|>"]
    if file in ("tokenizer_config.json", "chat_template.json"):
        folder = data.with_chat_template(word_tokenizer(), str(tmp_path))
        assert folder.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("none.jinja", None, "wants chatml or a file with a template .No such file"),
        ("bytes.jinja", b"\xff", "is not UTF-8 text"),
        ("plain.txt", b"no template at all", "it renders nothing of a message"),
        ("broken.jinja", b"{% for m in messages %}", "refuses the messages: .*endfor"),
        ("strict.jinja", b"{{ raise_exception('never') }}", "refuses the messages: never"),
        ("other.json", b'{"eos_token": "</s>"}', "holds no `chat_template` .KeyError"),
        ("list.json", b"[1]", "holds no `chat_template` .TypeError"),
        ("cut.json", b'{"chat_template": ', "holds no `chat_template` .JSONDecodeError"),
    ],
)
def test_a_file_without_a_template(tmp_path, file, content, reason):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match=f"chat_template: .*{file}.*{reason}"):
        data.with_chat_template(tokenizer, str(tmp_path / file))
    assert tokenizer.chat_template is None


def test_messages_without_a_template_name_the_flag():
    with pytest.raises(Bad, match="--chat_template"):
        data.encode_row(
            word_tokenizer(), {"prompt": data.Chat([ASK]), "completion": [TELL]}, ("completion",), max_length=9
        )
