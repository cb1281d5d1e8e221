"""Rewards that check a response, and the process that runs code which nobody has read."""

import ctypes
import doctest
import functools
import json
import platform
import socket
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from rlhf import rewards
from rlhf.rewards import checkers, json_schema, math_answer, regex, sandbox, unit_test
from rlhf.rewards.sandbox import SandboxError, run_checks, run_python


def ask(function, completions, **columns):
    return function(["?"] * len(completions), completions, [[]] * len(completions), **columns)


@pytest.mark.parametrize("module", [checkers, sandbox])
def test_examples_run(module, monkeypatch):
    found = doctest.DocTestFinder().find(module, globs=vars(module))
    missing = checkers.importlib.util.find_spec("jsonschema") is None
    chosen = [test for test in found if test.examples and not (missing and test.name.endswith("json_schema"))]
    assert len(chosen) >= 2
    runner = doctest.DocTestRunner()
    assert [runner.run(test).failed for test in chosen] == [0] * len(chosen)


@pytest.mark.parametrize(
    "text, number",
    [
        ("She has 12 cows and sells 5, so 7.", 7),
        ("#### 11", 11),
        ("7 + 4 #### 11\n\nThe next one: 2 + 2 = 4", 11),
        ("1,234,567.80", Fraction("1234567.8")),
        ("1, 2, 3", 3),
        ("1,2,3", 3),
        ("in 2024,15 of them", 15),
        ("$1,250.50.", Fraction("1250.5")),
        ("-$5.00", -5),
        ("$-5", -5),
        ("−7", -7),
        ("x=-5", -5),
        ("x = - 5", 5),  # a dash, as of a list
        ("5-3", 3),
        ("(2+3)-5", 5),
        ("COVID-19", 19),
        ("50%", 50),
        (r"50\%", 50),
        ("3/4 of them", Fraction(3, 4)),
        ("1 1/2 cups", Fraction(3, 2)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        (r"1{,}234", 1234),
        (r"1\,234", 1234),
        ("0.50", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("2e3", 2000),
        ("7.5e-1", Fraction(3, 4)),
        ("about 18.", 18),
        (r"\boxed{42}, and not 41", 42),
        (r"\boxed{41} or rather \boxed{42}", 42),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"\boxed{x = 5 \text{ apples}}", 5),
        (r"\boxed{\$1,000}", 1000),
        (r"\boxed{50\%}", 50),
        (r"\boxed{5 apples}", 5),
        (r"\boxed{3\sqrt{2}} 9", None),
        (r"\boxed{2\pi}", None),
        (r"\boxed{none} 9", None),
        (r"so \boxed{12", 12),
        ("H2O and x2", None),
        ("v1.2", None),
        ("1/0", None),
        ("9" * 5000, None),
        ("none", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert rewards.final_number(text) == number


def test_math_answer_compares_exactly():
    third = ["1/3", "0.33", "0.333333333333333333", r"\boxed{\frac{2}{6}}"]
    assert ask(math_answer, third, answer=["1/3"] * 4) == [1.0, 0.0, 0.0, 1.0]
    assert ask(math_answer, ["0.1", "0.1", "10", "10", "ten"], answer=[0.1, "1/10", 10, "$10.00", "10"]) == [
        1.0
    ] * 4 + [0]
    assert ask(math_answer, ["7", "7"], answer=[None, "so 3 + 4\n#### 7"]) == [None, 1.0]
    assert ask(math_answer, ["7", "7"], answer=["seven", "7"]) == [None, 1.0]
    with pytest.raises(ValueError, match="math_answer: the data have no column `answer`"):
        ask(math_answer, ["7"])


def test_math_answer_reads_gsm8k(shared_data):
    rows = [json.loads(line) for line in (shared_data / "math.jsonl").read_text().splitlines()]
    assert len(rows) == 2000
    completions, answers = ([row[name] for row in rows] for name in ("completion", "answer"))
    assert ask(math_answer, completions, answer=answers) == [1.0] * 2000
    wrong = [answer.replace(",", "") + "1" for answer in answers]
    assert ask(math_answer, completions, answer=wrong) == [0.0] * 2000


def test_regex():
    assert ask(regex, ["Yes.", "yes", "No"], pattern=["^Yes", "(?i)^YES$", None]) == [1.0, 1.0, None]
    assert ask(functools.partial(regex, pattern=r"\d{3}"), ["abc 123", "12"]) == [1.0, 0.0]
    assert ask(regex, [], pattern=[]) == []
    with pytest.raises(ValueError, match=r"pattern: '\(' is not a regular expression"):
        ask(regex, ["a"], pattern=["("])
    with pytest.raises(ValueError, match="regex: the data have no column `pattern`"):
        ask(regex, ["a"])


def test_a_regex_that_backtracks_for_ever_is_stopped():
    start = time.monotonic()
    found = ask(regex, ["a" * 60, "aab", "a" * 60], pattern=["(a+)+b"] * 3, time_limit_s=0.1)
    assert found == [0.0, 1.0, 0.0] and time.monotonic() - start < 30  # it would take centuries
    assert run_checks("regex", [("a" * 60, "(a+)+b"), ("b", "b")], row_time_limit_s=0.1) == [None, True]


SCHEMA = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer", "minimum": 0}}}


def test_json_schema():
    pytest.importorskip("jsonschema", reason="the optional package jsonschema is not installed")
    good = ['{"age": 7}', ' {"age": 0, "name": "x"}\n']
    bad = [
        '{"age": -1}',
        "{}",
        "[]",
        '{"age": 7} 8',
        "```json\n{}\n```",
        '{"age": NaN}',
        "",
        "[" * 100_000,
        '{"age": 7',
    ]
    assert ask(json_schema, good + bad, schema=SCHEMA) == [1.0] * 2 + [0.0] * 9
    assert ask(json_schema, ["7", '"a"', "1"], schema=['{"type": "integer"}', None, True]) == [1.0, None, 1.0]
    slow = {"type": "string", "pattern": "^(a+)+b$"}
    assert ask(json_schema, [json.dumps("a" * 60), '"aab"'], schema=slow, time_limit_s=0.2) == [0.0, 1.0]
    with pytest.raises(ValueError, match="schema: is not a JSON schema"):
        ask(json_schema, ["7"], schema={"type": "number of cows"})
    with pytest.raises(ValueError, match=r"schema: got '\{', which is not JSON"):
        ask(json_schema, ["7"], schema="{")
    with pytest.raises(ValueError, match="refers to a schema that is not in it"):
        ask(json_schema, ["7"], schema={"$ref": "http://localhost/other.json"})


def test_json_schema_names_the_package_that_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ValueError, match=r"needs the package jsonschema \(pip install 'rlhf-kernels\[rewards\]'\)"):
        ask(json_schema, ["7"], schema=SCHEMA)


def test_unit_test():
    good = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds."
    wrong, broken, bare = good.replace("+", "-"), "def add(a, b:", "def add(a, b): return a + b"
    test = "assert add(2, 3) == 5\nassert add('a', 'b') == 'ab'"
    assert ask(unit_test, [good, wrong, broken, bare, good], test=[test] * 4 + [None]) == [1.0, 0.0, 0.0, 1.0, None]
    with pytest.raises(ValueError, match="unit_test: the data have no column `test`"):
        ask(unit_test, [good])
    with pytest.raises(ValueError, match="time_limit_s: got 0, want a number > 0"):
        ask(unit_test, [good], test=test, time_limit_s=0)


@pytest.mark.parametrize(
    "text, code",
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n```\nprints\n```\n1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nbetter:\n```python\nx = 2\n```", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("```python\ns = '```'\n```", "s = '```'\n"),
    ],
)
def test_python_code(text, code):
    assert rewards.python_code(text) == code


CHEATS = {
    "exit": "import sys; sys.exit(0)",
    "hard exit": "import os; os._exit(0)",
    "exit when called": "import sys\ndef add(a, b): sys.exit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): return 0",
    "print": "print('passed')\ndef add(a, b): return 0",
    "forge": "import contextlib as c, os\nfor fd in range(1, 9):\n with c.suppress(OSError): os.write(fd, b'passed')",
    "main": "if __name__ == '__main__':\n    raise SystemExit(0)",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_leaving_early_does_not_pass(cheat):
    assert not run_python(CHEATS[cheat], "assert add(2, 3) == 5").passed


FORBIDDEN = {  # what the code tries, and what stops it
    "socket": ("import socket; socket.socket()", "PermissionError"),
    "unix socket": ("import socket; socket.socket(socket.AF_UNIX)", "PermissionError"),
    "raw call": ("import ctypes; assert ctypes.CDLL(None).socket(2, 1, 0) >= 0", "AssertionError"),
    "io_uring": (
        "import ctypes, os; c = ctypes.CDLL(None, use_errno=True)\n"
        "c.syscall(425, 8, bytes(120)); raise OSError(os.strerror(ctypes.get_errno()))",
        "Operation not permitted",
    ),
    "url": ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}')", "not permitted"),
    "fork": ("import os; os.fork()", "PermissionError"),
    "subprocess": ("import subprocess; subprocess.run(['true'])", "PermissionError"),
    "exec": ("import os; os.execv('/bin/true', ['true'])", "PermissionError"),
    "kill parent": ("import os; os.kill(os.getppid(), 0)", "PermissionError"),
    "kill group": ("import os; os.killpg(os.getpgid(os.getppid()), 0)", "PermissionError"),
    "trace": ("import ctypes; assert ctypes.CDLL(None).ptrace(16, {parent}, 0, 0) == 0", "AssertionError"),
    "raise a limit": ("import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 50, 1 << 50))", "maximum limit"),
    "another's limit": ("import os, resource; resource.prlimit(os.getppid(), 0, (1, 1))", "PermissionError"),
    "other user": ("import os; os.setuid(12345)", "PermissionError"),
    "mode": ("import os; os.chmod('{outside}', 0o777)", "PermissionError"),
    "memory": ("x = bytearray(300 << 20)", "MemoryError"),
    "large file": ("open('x', 'wb').write(bytes(17 << 20))", "File too large"),
    "stdin": ("input()", "EOFError"),
    "no end": ("while True: pass", "time limit of 1 s"),
    "asleep": ("import time; time.sleep(60)", "time limit of 1 s"),
    "crash": ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
}  # fmt: skip


@pytest.mark.parametrize("attempt", FORBIDDEN)
def test_what_the_code_must_not_do(attempt, tmp_path):
    source, reason = FORBIDDEN[attempt]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        names = {"port": server.getsockname()[1], "parent": sandbox.os.getpid(), "outside": tmp_path}
        for name, value in names.items():
            source = source.replace(f"{{{name}}}", str(value))
        outcome = run_python(source, time_limit_s=1 if "limit of 1" in reason else 10, memory_limit_mb=256)
        assert not outcome.passed and reason in outcome.reason
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x32 is a second set of system calls of x86-64 alone")
def test_the_other_system_calls_of_the_processor():
    """x32 numbers name the same calls: socket is 41 there too, above a bit that a filter may forget."""
    outcome = run_python("import ctypes; ctypes.CDLL(None).syscall(0x40000000 + 41, 2, 1, 0)")
    assert outcome == (False, "the process ended early (SIGSYS)")


def test_nothing_is_written_outside_and_nothing_is_left(tmp_path):
    if ctypes.CDLL(None).syscall(444, None, 0, 1) < 1:
        pytest.skip("this kernel has no Landlock")
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    for source in (
        f"open({str(kept)!r}, 'w')",
        f"open({str(tmp_path / 'made')!r}, 'w')",
        f"import os; os.remove({str(kept)!r})",
    ):
        outcome = run_python(source)
        assert not outcome.passed and "PermissionError" in outcome.reason
    assert kept.read_text() == "as it was" and len(list(tmp_path.iterdir())) == 1


def test_what_the_code_may_do(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    source = """
import os, tempfile, threading, asyncio
assert os.listdir() == [] and os.path.realpath(os.environ["HOME"]) == os.getcwd()
assert "SECRET_TOKEN" not in os.environ and "PATH" not in os.environ
with tempfile.NamedTemporaryFile() as file:
    file.write(b"x")
open("/dev/null", "w").write("x")
found = []
thread = threading.Thread(target=found.append, args=(1,))
thread.start(), thread.join()
assert found == [1]
asyncio.run(asyncio.sleep(0))
print("x" * 10_000_000)
"""
    assert run_python(source, time_limit_s=30) == (True, "passed")
    command = [sys.executable, "-c", "print(hash('a'))"]
    seeded = subprocess.run(command, env={"PYTHONHASHSEED": "0"}, capture_output=True, check=True, text=True).stdout
    assert run_python(f"assert hash('a') == {seeded}") == (True, "passed")  # sets have one order in every process


def test_the_directory_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    deep = "import os\nfor _ in range(1200):\n    os.mkdir('d')\n    os.chdir('d')"
    assert run_python(deep, time_limit_s=30) == (True, "passed")
    assert run_python("import os; os.makedirs('a/b'); os.mkdir('closed', 0)") == (True, "passed")
    assert not run_python("open('x', 'w').write('x')\nwhile True: pass", time_limit_s=0.5).passed
    assert list(tmp_path.iterdir()) == []


def test_reasons_name_the_place():
    outcome = run_python("def f():\n    return 1 / 0", "x = 1\nf()")
    assert outcome == (False, "ZeroDivisionError: division by zero (part 1, line 2)")
    assert run_python("x =").reason.startswith("SyntaxError: invalid syntax")


def test_where_the_process_cannot_be_confined_nothing_runs(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    child = tmp_path / "child.py"
    child.write_text(
        f"import sys; sys.path.insert(0, {str(Path(sandbox.__file__).parent)!r})\n"
        "import platform; platform.machine = lambda: 'pdp11'\nimport sandbox_child; sandbox_child.main()"
    )
    monkeypatch.setattr(sandbox, "CHILD", child)
    with pytest.raises(SandboxError, match="cannot confine a process, so no code is run: the system calls of pdp11"):
        run_python(f"open({str(marker)!r}, 'w')")
    with pytest.raises(SandboxError, match="cannot confine"):
        run_checks("regex", [("a", "a")])
    assert not marker.exists()
    child.write_text("raise RuntimeError('broken')")
    with pytest.raises(SandboxError, match=r"(?s)ended with status 1: .*RuntimeError: broken"):
        run_checks("regex", [("a", "a")])


@pytest.mark.parametrize("limit", ["time_limit_s", "memory_limit_mb"])
def test_bad_limits(limit):
    with pytest.raises(ValueError, match=f"{limit}: got -1, want a number > 0"):
        run_python("x = 1", **{limit: -1})
    with pytest.raises(ValueError, match="row_time_limit_s: got 0"):
        run_checks("regex", [("a", "a")], row_time_limit_s=0)
