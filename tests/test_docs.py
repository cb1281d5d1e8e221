"""What the documentation says is true: headings, defaults, examples, and the paths, flags and targets it names."""

import ast
import doctest
import importlib
import inspect
import itertools
import pkgutil
import re
from pathlib import Path

import pytest

import rlhf_kernels

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = [
    name
    for name in rlhf_kernels.__all__
    if inspect.isroutine(getattr(rlhf_kernels, name)) and not inspect.isclass(getattr(rlhf_kernels, name))
]
MODULES = [
    info.name
    for info in pkgutil.iter_modules(rlhf_kernels.__path__)
    if not info.ispkg and not info.name.startswith("_")
]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LITERAL = r"None|True|False|\"[^\"\n]*\"|'[^'\n]*'|-?\d+(?:\.\d+)?(?:e-?\d+)?"
FOLDERS = "csrc|rlhf_kernels|rlhf|benchmarks|tests|docs|\\.ci"
SOURCES = ("rlhf/**/*.py", "rlhf_kernels/*.py", "tests/*.py", "benchmarks/*.py", "Makefile", ".ci/run", "setup.py")


def sections(function):
    """{heading: text} of a docstring; the heading's own line counts to its text."""
    parts = re.split(r"^(Args|Returns|Raises|Cost|Example):", inspect.getdoc(function) or "", flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def argument_texts(function):
    """{argument: what its entry under Args says}."""
    entries = re.split(r"^ {4}([\w*, ]+):", sections(function).get("Args", ""), flags=re.MULTILINE)
    return {name.strip(" *"): text for names, text in zip(entries[1::2], entries[2::2]) for name in names.split(",")}


def named_defaults(text):
    """The defaults that prose names: "default 1.0", or "None for no cap, the default"."""
    flat = " ".join(text.split())
    found = re.findall(rf"\bdefault:?(?: of)? ({LITERAL})", flat)
    found += re.findall(rf"({LITERAL})[^,.;\"]*, the default", flat)
    return [ast.literal_eval(value) for value in found]


def signature(function):
    return inspect.signature(inspect.unwrap(function)).parameters


@pytest.mark.parametrize("name", FUNCTIONS)
def test_headings(name):
    function = getattr(rlhf_kernels, name)
    present = sections(function)
    wanted = {"Returns", "Raises", "Cost", "Example"}
    if function.__module__.endswith(".dispatch"):  # these choose who computes; they compute nothing
        wanted = {"Example"}
    if signature(function):
        wanted |= {"Args"}
    assert wanted <= present.keys(), f"{name} lacks {sorted(wanted - present.keys())}"
    assert ">>>" in present["Example"], f"the example of {name} does not run"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_and_defaults(name):
    function = getattr(rlhf_kernels, name)
    described, parameters = argument_texts(function), signature(function)
    assert described.keys() == set(parameters), (
        f"{name}: undescribed {set(parameters) - described.keys()}, unknown {described.keys() - set(parameters)}"
    )
    for argument, text in described.items():
        for value in named_defaults(text):
            default = parameters[argument].default
            assert value == default and type(value) is type(default), (
                f"{name}: the docstring names {value!r} as the default of {argument}, the signature {default!r}"
            )


def test_named_defaults_are_found():
    assert named_defaults("> 0, divides the logits; default 1.0.") == [1.0]
    assert named_defaults('"mean", the default, "sum", or\n  "none".') == ["mean"]
    assert named_defaults("> 0, or None for no cap, the default.") == [None]
    assert named_defaults("label that does not count, default -100: 0, no gradient") == [-100]
    assert named_defaults("None = all; paper: 0.2") == []


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(f"rlhf_kernels.{name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples in {name} fail, see the output"


def code_of(page):
    """The page's code: fenced blocks, inline code, and targets of relative links."""
    text = page.read_text()
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return "\n".join([*fenced, *inline])


def expand(pattern):
    """`a/{b,c}.py` -> a/b.py, a/c.py."""
    pieces = re.split(r"\{([^}]*)\}", pattern)
    choices = [piece.split(",") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def source_text():
    return "\n".join(path.read_text() for pattern in SOURCES for path in ROOT.glob(pattern))


def need_page(name):
    page = ROOT / name
    assert page.is_file(), f"{name} is missing"
    return page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_exist(page):
    """Paths under our folders that a page names as code; `<op>` and the like stand for a name and are let through."""
    missing = []
    for path in re.findall(rf"(?<![\w./<>*-])((?:{FOLDERS})/[\w./<>*{{}},+-]*[\w/*}}])", code_of(page)):
        if "<" in path:
            continue
        missing += [found for found in expand(path) if not any(ROOT.glob(found.rstrip("/")))]
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text())
    missing += [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page.name} names what is not there: {sorted(set(missing))}"


@pytest.mark.parametrize("name", ("README.md", "CONTRIBUTING.md"))
def test_flags_exist(name):
    """Each --flag is a field or an option of ours, or belongs to another program's command."""
    lines = [
        line for line in code_of(need_page(name)).replace("\\\n", " ").splitlines()
        if not re.match(r"\s*\$?\s*(pip|git|torchrun|accelerate|ruff|apt-get|docker)\b", line)
    ]  # fmt: skip
    source = source_text()
    flags = {flag for line in lines for flag in re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", line)}
    fields = _trainer_fields()
    unknown = {
        flag for flag in flags
        if flag.replace("-", "_") not in fields and not re.search(rf"--{flag}\b|\b{flag.replace('-', '_')}\s*:", source)
    }  # fmt: skip
    assert not unknown, f"{name} names flags that nothing takes: {sorted(unknown)}"


def _trainer_fields():
    """Flags that our stages inherit from transformers."""
    from transformers import TrainingArguments

    return set(inspect.signature(TrainingArguments).parameters)


@pytest.mark.parametrize("name", ("README.md", "CONTRIBUTING.md"))
def test_make_targets_exist(name):
    page = need_page(name)
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", code_of(page)))
    if named:
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        assert named <= targets, f"{name} names targets that the Makefile lacks: {sorted(named - targets)}"
