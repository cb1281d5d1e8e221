"""What the documentation says is true: headings, defaults, examples, and the paths, flags and targets it names.

The README is short enough to be read, the reference forgets nothing that is public.
"""

import ast
import contextlib
import doctest
import importlib
import inspect
import io
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


def need_page(name):
    page = ROOT / name
    assert page.is_file(), f"{name} is missing"
    return page


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_exist(page):
    """Paths under our folders that a page names as code; `<op>` and the like stand for a name and are let through."""
    missing = []
    for path in re.findall(rf"(?<![\w./<>*-])((?:{FOLDERS})/[\w./<>*{{}},+-]*[\w/*}}])", code_of(page)):
        if "<" in path:
            continue
        missing += [found for found in expand(path) if not any(ROOT.glob(found.rstrip("/")))]
    assert not missing, f"{page.name} names what is not there: {sorted(set(missing))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    """Relative links and pictures point at files, and what follows a # at a heading."""
    missing = []
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)|(?:src|srcset|href)=\"([^\"]+)\"", prose(page)):
        path, _, anchor = (link[0] or link[1]).partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append("".join(link))
    assert not missing, f"{page.name} leads to what is not there: {missing}"


def prose(page):
    """The page's text without its code."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))


def anchors(page):
    """Names of the page's headings in links."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_readme_is_short():
    """Two minutes' reading: at most 180 lines of at most 120 characters, tables too; ten measured rows."""
    lines = need_page("README.md").read_text().splitlines()
    assert len(lines) <= 180, f"README.md has {len(lines)} lines"
    long = {number: len(line) for number, line in enumerate(lines, start=1) if len(line) > 120}
    assert not long, f"README.md has lines of more than 120 characters (line: characters): {long}"
    begin, end = (lines.index(f"<!-- benchmarks:{mark} -->") for mark in ("begin", "end"))
    rows = [line for line in lines[begin:end] if line.startswith("| `")]
    assert 0 < len(rows) <= 10


SNIPPETS = [
    snippet
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
    for snippet in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.strip().splitlines()[-1][:40])
def test_snippets_run(snippet, tmp_path, monkeypatch):
    """Each in a folder of its own; the comment behind a `print(...)` is what it prints."""
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "snippet", "exec"), {"__name__": "snippet"})
    wanted = re.findall(r"^print\(.*\)  # (.+)$", snippet, flags=re.MULTILINE)
    if wanted:
        assert printed.getvalue().splitlines() == wanted


def documented():
    """{name: dotted path} of what the reference shows: each directive, and what a module's directive stands for."""
    text = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    paths = re.findall(r"^::: ([\w.]+)", text, flags=re.MULTILINE)
    found = {path.rpartition(".")[2]: path for path in paths}
    for path in paths:
        file = ROOT / f"{path.replace('.', '/')}.py"
        if file.is_file():
            found |= {name: f"{path}.{name}" for name in public_names(file)}
    return found


def public_names(file):
    """Functions and classes at a file's top level, without an underscore."""
    kinds = ast.FunctionDef | ast.ClassDef
    return [n.name for n in ast.parse(file.read_text()).body if isinstance(n, kinds) and not n.name.startswith("_")]


def test_reference_shows_all_that_is_public():
    """Every name of rlhf_kernels and of its integrations; the settings, runs and trainers of every stage of rlhf."""
    wanted = set(rlhf_kernels.__all__) - {"__version__"}
    for file in ROOT.glob("rlhf_kernels/integrations/[a-z]*.py"):
        wanted |= set(public_names(file))
    for file in ROOT.glob("rlhf/**/*.py"):
        wanted |= {
            name for name in public_names(file) if re.fullmatch(r"\w+Config|(SFT|Reward|DPO|KTO|PPO)Trainer", name)
        }
    wanted |= set(getattr(importlib.import_module("rlhf"), "__all__", ()))
    missing = wanted - documented().keys()
    assert not missing, f"docs/reference forgets {sorted(missing)}"


def test_reference_names_what_exists():
    for name, path in documented().items():
        module = path.rpartition(".")[0]
        file, source = (ROOT / f"{dotted.replace('.', '/')}.py" for dotted in (path, module))
        if file.is_file() or (source.name.startswith("_") and name in public_names(source)):
            continue  # a private file may import a package that is not installed
        assert hasattr(importlib.import_module(module), name), f"docs/reference names {path}"


def test_citation_is_of_this_version():
    text = need_page("CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", text, flags=re.MULTILINE)[1].strip("\"'") == rlhf_kernels.__version__
    assert "license: Apache-2.0" in text


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


def test_the_page_on_data_names_every_format():
    """Each under the commands that its rows serve."""
    formats = importlib.import_module("rlhf.data.formats").FORMATS
    text = need_page("docs/data.md").read_text()
    table = {name for line in text.splitlines() if line.startswith("| ") for name in re.findall(r"`([\w-]+)`", line)}
    assert formats.keys() <= table
