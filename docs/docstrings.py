"""How the reference shows our docstrings: sections become Markdown, settings of a stage a table. Used by mkdocs.yml.

The sources are read, not imported, so that the site builds without torch.
"""

from __future__ import annotations

import ast
import inspect
import re

import griffe

SECTIONS = ("Args", "Returns", "Raises", "Cost", "Example")
_HEADING = re.compile(rf"^({'|'.join(SECTIONS)}):", re.MULTILINE)
_ENTRY = re.compile(r"^([\w*][\w*, ]*|[A-Z]\w*Error):[ \n]", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package that is documented."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(inspect.cleandoc(obj.docstring.value))

    def on_class_members(self, *, cls: griffe.Class, **kwargs) -> None:
        hidden = [cls.module.members[str(base)] for base in cls.bases if str(base).startswith("_")]
        members = [member for part in (*hidden, cls) for member in part.members.values()]
        attributes = [member for member in members if not member.is_alias and member.is_attribute]
        settings = [row for attribute in attributes if (row := setting(attribute))]
        fields = [line for attribute in attributes if (line := field(attribute))]
        if settings:
            extra = "\n".join(["| setting | type | default | what |", "|---|---|---|---|", *settings])
        elif fields and cls.bases + cls.decorators:  # a NamedTuple or a dataclass
            extra = "**Fields**\n\n" + "\n".join(fields)
        else:
            return
        text = "" if cls.docstring is None else cls.docstring.value + "\n\n"
        cls.docstring = griffe.Docstring(text + extra, parent=cls)


def markdown(text: str) -> str:
    """A docstring as Markdown: what stands before the sections as paragraphs, then each section under its name."""
    first, *rest = _HEADING.split(text)
    parts = [paragraphs(first)]
    for name, body in zip(rest[::2], rest[1::2]):
        body = inspect.cleandoc("\n" + body)
        if name == "Example":
            parts.append(f"**Example**\n\n```{'pycon' if '>>>' in body else 'python'}\n{body}\n```")
        elif name in ("Args", "Raises"):
            parts.append(f"**{name}**\n\n{entries(body)}")
        else:
            parts.append(f"**{name}**\n\n{paragraphs(body)}")
    return "\n\n".join(part for part in parts if part.strip())


def paragraphs(text: str) -> str:
    """A line that begins with `name: ` starts on a line of its own, and a list after a text is one."""
    text = re.sub(r"(?<=\S)\n(?=[\w ]{2,24}: )", "  \n", text.strip())
    return re.sub(r"(?<=[^\n])\n(?=- )", "\n\n", text) if not re.match(r"- ", text) else text


def entries(body: str) -> str:
    """`name: text` and its indented lines, as a list with an item for each name."""
    found = _ENTRY.split("\n" + body if not _ENTRY.match(body) else body)
    items = []
    for names, text in zip(found[1::2], found[2::2]):
        items.append(f"- `{names.strip()}`: {' '.join(text.split())}")
    return "\n".join(items) or paragraphs(body)


def field(attribute: griffe.Attribute) -> str | None:
    """A list's item of a public field, with the comment behind it; None for a constant or a property."""
    if attribute.annotation is None or "property" in attribute.labels or attribute.name.startswith("_"):
        return None
    if "ClassVar" in str(attribute.annotation):
        return None
    comment = attribute.lines[-1].partition("  # ")[2].strip()
    return f"- `{attribute.name}`: {comment or f'`{attribute.annotation}`'}"


def setting(attribute: griffe.Attribute) -> str | None:
    """A table's row of a field that is made with its help; None for anything else."""
    if attribute.value is None:
        return None
    call = ast.parse(str(attribute.value), mode="eval").body
    if not isinstance(call, ast.Call) or ast.unparse(call.func) not in ("option", "_option", "field"):
        return None
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    default = named.get("default") or (call.args or [None])[0]
    text = call.args[1] if len(call.args) > 1 else named.get("help", named.get("metadata"))
    if default is None or text is None:
        return None
    text = ast.literal_eval(text)
    text = text["help"] if isinstance(text, dict) else text
    cells = (f"`{attribute.name}`", f"`{attribute.annotation}`", f"`{ast.unparse(default)}`", text)
    return f"| {' | '.join(cell.replace('|', '&#124;' if cell == text else '|') for cell in cells)} |"
