"""Giving a tokenizer a chat template: `chatml`, which is written here, or one from a file."""

import json
from pathlib import Path

from .chat import render
from .files import Bad

TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = """
{%- macro turn(role, text) %}{{- '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' }}{% endmacro %}
{%- set talk = messages %}
{%- if tools %}
    {%- set first = '' %}
    {%- if talk[0].role == 'system' %}{% set first = talk[0].content + '\\n\\n' %}{% set talk = talk[1:] %}{% endif %}
    {%- set ns = namespace(list='') %}
    {%- for tool in tools %}{% set ns.list = ns.list + '\\n' + (tool | tojson) %}{% endfor %}
    {{- turn('system', first + 'These tools can be called, each call as a JSON object of a name and arguments between '
        + '<tool_call> and </tool_call>:' + ns.list) }}
{%- endif %}
{%- for m in talk %}
    {%- set ns = namespace(text=m.content or '') %}
    {%- if m.role == 'assistant' and m.reasoning_content %}
        {%- set ns.text = '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' + ns.text %}
    {%- endif %}
    {%- for call in m.tool_calls or [] %}
        {%- set f = call.function or call %}
        {%- set given = f.arguments if f.arguments is string else f.arguments | tojson %}
        {%- set ns.text = ns.text + ('\\n' if ns.text else '') + '<tool_call>\\n{"name": "' + f.name
            + '", "arguments": ' + given + '}\\n</tool_call>' %}
    {%- endfor %}
    {{- turn(m.role, ns.text) }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
""".strip()


def with_chat_template(tokenizer, name):
    """Give a tokenizer the template `name`: chatml, or a file with one; tokens of chatml that it lacks are added.

    Args:
        name: chatml; or a file: the template itself (jinja), a tokenizer_config.json or a chat_template.json that holds
            one, or a folder with one of these. None changes nothing.
    Raises:
        ValueError: the file cannot be read, or renders nothing of a message.
    """
    if name is None:
        return tokenizer
    template = CHATML if name == "chatml" else _read(Path(name).expanduser(), name)
    missing = [token for token in TURN_TOKENS if token in str(template) and token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        _try(tokenizer, name)
    except ValueError:
        tokenizer.chat_template = before
        raise
    return tokenizer


def _read(path, name):
    if path.is_dir():
        found = [path / file for file in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")]
        path = next((file for file in found if file.is_file()), path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise ValueError(f"chat_template: got {name!r}, wants chatml or a file with a template ({reason})") from None
    if path.suffix != ".json":
        return text
    try:
        found = json.loads(text)
        found = found["chat_template"]
        return found if isinstance(found, str) else {entry["name"]: entry["template"] for entry in found}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"chat_template: {path} holds no `chat_template` ({type(error).__name__}: {error})") from None


def _try(tokenizer, name):
    """Raise unless the template renders a message, with a system message before it or without."""
    word, reason = "Qqa", "it renders nothing of a message"
    question = [{"role": "user", "content": word}]
    for system in ([], [{"role": "system", "content": "s"}]):
        try:
            if word in render(tokenizer, None, [*system, *question], add_generation_prompt=True):
                return
        except Bad as error:
            reason = str(error)
    raise ValueError(f"chat_template: {name} cannot be used: {reason}")
