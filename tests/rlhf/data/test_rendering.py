"""Plain conversations are rendered as transformers renders them; all others, and where in doubt all, by itself."""

import jinja2
import pytest

from rlhf.data import rendering
from rlhf.data.chat import render
from rlhf.data.files import Bad
from rlhf.data.messages import Chat
from rlhf.data.rendering import COMPARED, Plain
from tests.tiny import word_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m['role'] }}:{{ m.content | trim }}{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ eos_token }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
PLAIN = [{"role": "user", "content": " a é\n"}, {"content": "b </s> {{ c }}", "role": "assistant"}]
OTHERS = [
    [{"role": "assistant", "content": "a", "thinking": "deep"}],
    [{"role": "assistant", "content": None, "reasoning_content": "deep"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "user", "content": "a", "name": None}],
]


@pytest.fixture
def tokenizer():
    return word_tokenizer(bos="<s>", chat_template=TEMPLATE)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_plain_conversations_are_as_of_transformers(tokenizer, add_generation_prompt):
    options = {"add_generation_prompt": add_generation_prompt}
    for messages in (PLAIN, PLAIN[:1], Chat(PLAIN)):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert Plain(tokenizer).render(tokenizer, messages, **options) == expected
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    expected = tokenizer.apply_chat_template(PLAIN, tokenize=False, **options)
    assert expected.startswith("<begin>") and Plain(tokenizer).render(tokenizer, PLAIN, **options) == expected


@pytest.mark.parametrize("messages", OTHERS)
def test_of_other_conversations_transformers_is_asked(tokenizer, messages):
    assert Plain(tokenizer).render(tokenizer, messages) is None
    assert render(tokenizer, messages, messages) == tokenizer.apply_chat_template(messages, tokenize=False)
    with_tools = Chat(PLAIN, tools=[{"type": "function", "function": {"name": "f"}}])
    assert '"name": "f"' in render(tokenizer, with_tools, with_tools)


def test_what_a_template_refuses_it_refuses(tokenizer):
    messages = [{"role": "tool", "content": "a"}]
    with pytest.raises(Bad, match="refuses the messages: no tools here"):
        render(tokenizer, messages, messages)


def test_a_rendering_that_differs_leaves_all_to_transformers(tokenizer, monkeypatch):
    other = jinja2.Environment().from_string(
        "{% if messages | length > 1 %}something else{% else %}user:a</s>{% endif %}"
    )
    monkeypatch.setattr(rendering, "_compiled", lambda _: other)
    tokenizer.chat_template = "{{ messages[0].role }}:{{ messages[0].content }}</s>"
    plain = Plain(tokenizer)
    assert plain.render(tokenizer, [{"role": "user", "content": "a"}]) == "user:a</s>"
    assert plain.render(tokenizer, PLAIN) is None
    assert plain.render(tokenizer, [{"role": "user", "content": "a"}]) is None


def test_transformers_is_asked_beside_the_template_at_first_alone(tokenizer, monkeypatch):
    plain, asked, ask = Plain(tokenizer), [], type(tokenizer).apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: asked.append(a) or ask(tokenizer, *a, **k))
    for _ in range(COMPARED + 10):
        plain.render(tokenizer, PLAIN)
    assert len(asked) == COMPARED


def test_a_tokenizer_with_a_way_of_its_own_is_asked(tokenizer, monkeypatch):
    class Own(type(tokenizer)):
        def apply_chat_template(self, messages, **options):
            return f"{len(messages)} messages"

    own = Own(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", chat_template=TEMPLATE)
    assert Plain(own).render(own, PLAIN) is None and render(own, PLAIN, PLAIN) == "2 messages"
    monkeypatch.delattr("transformers.utils.chat_template_utils._compile_jinja_template")
    assert Plain(tokenizer).render(tokenizer, PLAIN) is None
    assert rendering._compiled(tokenizer) is None
