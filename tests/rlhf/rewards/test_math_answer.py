"""Answers that are expressions, and which part of a response counts; what the checks say of rows."""

import functools
import json
import logging
import os
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf import rewards
from rlhf.rewards import NoReward, expressions, json_schema, math_answer, regex, row_checks, sandbox, unit_test
from rlhf.rewards import workers as workers_module
from rlhf.rewards.final_answer import final_part
from rlhf.rewards.sandbox import SandboxError
from rlhf.rewards.workers import Workers


@pytest.fixture
def math_verify():
    return pytest.importorskip("math_verify", reason="the optional package math-verify is not installed")


def grade(truth, response):
    return math_answer(["?"], [response], [[]], answer=[truth])[0]


@pytest.mark.parametrize(
    "truth, right, wrong",
    [
        ("x + 1", r"so \boxed{1+x}", r"\boxed{x-1}"),
        (r"(x+1)(x-1)", r"\boxed{x^2-1}", r"\boxed{x^2+1}"),
        (r"\sqrt{2}", r"\boxed{2^{1/2}}", r"\boxed{2}"),
        ("sqrt(2)/2", r"\boxed{\frac{1}{\sqrt{2}}}", r"\boxed{\frac{1}{2}}"),
        ("x**10", r"\boxed{x^{10}}", r"\boxed{x^{1}0}"),
        ("sin(x)^2 + cos(x)^2", "The answer is 1.", "The answer is 2."),
        (r"\frac{\pi}{2}", r"It is $0.5\pi$.", r"It is $0.4\pi$."),
        ("π/2", r"\boxed{\frac{\pi}{2}}", r"\boxed{\pi}"),
        (r"\{1, 2\}", r"\boxed{\{2,1\}}", r"\boxed{\{2,3\}}"),
        (r"\left[0, 1\right)", r"\boxed{[0,1)}", r"\boxed{[0,1]}"),
        ("(-∞, 3]", r"\boxed{(-\infty,3]}", r"\boxed{(-\infty,3)}"),
        (r"(-\infty,0)\cup(1,2)", r"\boxed{(1,2)\cup(-\infty,0)}", r"\boxed{(1,2)}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\boxed{1,2}"),
        (r"\pm 3", r"\boxed{3,-3}", r"\boxed{3}"),
        ("2 or 3", "The answer is $3$, $2$.", "The answer is $3$."),
        ("2, 3 and 4", "The answer is $3$, $4$ and $2$.", "The answer is $3$ and $2$."),
        ("[2sqrt(3), inf)", r"\boxed{\left[\sqrt{12}, \infty\right)}", r"\boxed{[2, \infty)}"),
        ("y = 2x + 3", r"\boxed{3+2x}", r"\boxed{3-2x}"),
        (r"3\sqrt{2}\text{ cm}", r"\boxed{3\sqrt{2}}", r"\boxed{3}"),
        (r"3\sqrt{2} oranges", r"\boxed{3\sqrt{2}}", r"\boxed{2}"),
        ("3", r"\boxed{\sqrt{9}}", r"\boxed{\sqrt{8}}"),
        (r"\text{Tuesday}", "The answer is Tuesday.", r"\boxed{\text{Monday}}"),
        (r"\text{no solution}", r"\boxed{\text{No solution}}", r"\boxed{\text{one solution}}"),
        ("C", "The answer is (C).", "The answer is (A)."),
        ("C", r"\boxed{\text{C}}", r"\boxed{5}"),
        (r"We see $x = 2$, so \boxed{x^2}.", r"\boxed{x \cdot x}", r"\boxed{2x}"),
    ],
)
def test_expressions(math_verify, truth, right, wrong):
    assert grade(truth, right) == 1.0
    assert grade(truth, wrong) == 0.0


@pytest.mark.parametrize(
    "truth, response, reward",
    [
        ("1/2", r"\boxed{0.5}", 1.0),
        ("1/2", r"\boxed{\frac12}", 1.0),
        ("0.5", r"\boxed{50\%}", 1.0),
        ("50%", "50", 1.0),
        ("50%", "0.5", 1.0),
        ("50%", "5", 0.0),
        ("50%", "0.5%", 0.0),
        ("50 percent", r"\boxed{50\%}", 1.0),
        (r"\$1,250.50", "1250.5", 1.0),
        ("1,234,567", r"\boxed{1{,}234{,}567}", 1.0),
        ("1 1/2", r"\boxed{1\frac{1}{2}}", 1.0),
        ("-1 1/2", r"\boxed{-1\frac12}", 1.0),
        ("-1 1/2", r"\boxed{-\frac12}", 0.0),
        ("1e-3", r"\boxed{1 \times 10^{-3}}", 1.0),
        (r"6.02\times10^{23}", "6.02e23", 1.0),
        (r"2 \cdot 10^3", "2000 m", 1.0),
        ("−7", r"\boxed{-7}", 1.0),
        (90, r"\boxed{90^\circ}", 1.0),
        (90, r"\boxed{90^{\circ}}", 1.0),
        (0.1, "1/10", 1.0),
        (5, r"\boxed{\textbf{5}}", 1.0),
        (5, r"\boxed{5\text{ cm}}", 1.0),
        (5, r"\boxed{\text{five}}", 0.0),
        (3, r"\boxed{1}, then \boxed{3}", 1.0),
        (3, r"\boxed{3}, then \boxed{1}", 0.0),
        (3, r"\boxed{\text{thus \fbox{3}}}", 1.0),
        (5, "The answer is 5. (I tried 3 ways.)", 1.0),
        (3, "The answer is 5. (I tried 3 ways.)", 0.0),
        (42, "**Answer:** 42 apples, as 6 * 7 is 42", 1.0),
        (9, "The answer is 12 - 3 = 9", 1.0),
        (12, "The answer is 12 - 3 = 9", 0.0),
        (5, "The answer is 5, since $x = 3$.", 1.0),
        (3, "The answer is 5, since $x = 3$.", 0.0),
        (5, "ANSWER: 5", 1.0),
        (Decimal("0.50"), "1/2", 1.0),
        (11, "The answer is x + 11", 0.0),
        (1, "The answer is (1, 2)", 0.0),
        (12, "The answer is:\n\n12", 1.0),
        (12, "So the final answer to the question is $12$, since 3 times 4 is 12.", 1.0),
        (7, "It costs 5$, and 7$ with the cup.", 1.0),
        (7, "7 ($n$ of them)", 1.0),
        (3, "So we get $2\\sqrt{3}$.", 0.0),
        (1, "", 0.0),
        (1, "none", 0.0),
        (None, "1", None),
        ("She has 3 + 4.\n#### 1,007", "1007", 1.0),
    ],
)
def test_numbers_and_the_part_that_counts(truth, response, reward):
    assert grade(truth, response) == reward


def test_numbers_need_no_package(monkeypatch):
    monkeypatch.setattr(expressions, "available", lambda: False)
    assert grade("1/2", r"\boxed{\frac12}") == 1.0
    assert grade("2", r"\boxed{\sqrt{4}}") == 0.0
    assert grade(r"\text{yes}", r"\boxed{\text{Yes}}") == 1.0
    for call in (lambda: grade("x + 1", "1"), lambda: math_answer.check_rows([{"answer": "x + 1"}])[0]):
        try:
            error = call()
        except ValueError as raised:
            error = raised
        assert "answer: got 'x + 1'" in str(error) and not isinstance(error, NoReward)
        assert "needs the package math-verify (pip install 'rlhf-kernels[rewards]')" in str(error).replace(
            "need ", "needs "
        )


UNREADABLE = ["", "  ", "???", r"\frac{1}{", r"\frac{1}{0}", "see the figure", ["1"], {"a": 1}, True, float("nan")]


@pytest.mark.parametrize("truth", UNREADABLE, ids=repr)
def test_a_truth_that_cannot_be_read_gives_none(math_verify, truth):
    assert grade(truth, r"\boxed{1}") is None
    (said,) = math_answer.check_rows([{"answer": truth}])
    assert isinstance(said, NoReward) and "answer: got " in str(said) and "cannot be read" in str(said)


def test_solutions_of_math_and_answers_of_gsm8k():
    solution = r"Let $x$ be it. Then $x = \frac{6}{8}$, so $x = \boxed{\frac{3}{4}}$."
    columns = {"answer": [None, "2", None, "so 6 * 7 = 42\n#### 42"], "solution": [solution, solution, None, None]}
    said = math_answer(["?"] * 4, ["0.75", "2", "1", "42"], [[]] * 4, **columns)
    assert said == [1.0, 1.0, None, 1.0]
    assert math_answer(["?"], ["0.75"], [[]], solution=solution) == [1.0]
    with pytest.raises(ValueError, match="math_answer: the data have no column `answer` or `solution`"):
        math_answer(["?"], ["1"], [[]], other=["1"])


def shapes(number):
    """Ways in which people write a fraction."""
    top, bottom = number.as_integer_ratio()
    sign, top = "-" * (top < 0), abs(top)
    yield f"{sign}{top}/{bottom}"
    for frac in ("frac", "dfrac", "tfrac"):
        yield rf"{sign}\{frac}{{{top}}}{{{bottom}}}"
    if top > bottom > 1:
        yield rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}"
        yield f"{sign}{top // bottom} {top % bottom}/{bottom}"
    if bottom == 1:
        yield f"{sign}{top:,}"
        yield rf"{sign}{top:,}".replace(",", "{,}")
        yield f"{sign}{top}.00"
    if 10**6 % bottom == 0:
        scaled = top * (10**6 // bottom)
        yield f"{sign}{scaled // 10**6}.{scaled % 10**6:06d}"
        yield f"{sign}{scaled}e-6"
        yield rf"{sign}{scaled} \times 10^{{-6}}"


@settings(max_examples=60, deadline=None)
@given(st.fractions(min_value=-2000, max_value=2000, max_denominator=400), st.data())
def test_every_way_to_write_a_fraction_is_the_fraction(number, data):
    truth, written = (data.draw(st.sampled_from(list(shapes(number)))) for _ in range(2))
    around = data.draw(
        st.sampled_from([r"\boxed{%s}", "The answer is %s.", "#### %s", "Answer: $%s$", "we find %s", r"\[ x = %s \]"])
    )
    assert grade(truth, around % written) == 1.0
    assert rewards.final_number(around % written) == number
    other = number + Fraction(1, 1000)
    assert grade(str(other), around % written) == 0.0


@settings(max_examples=100, deadline=None)
@given(st.text("\\boxed{}$()[]^_#%. 0123456789-+/*=<>answer is:\n,×π\"'", max_size=200))
def test_no_text_is_too_strange(text):
    part, number = final_part(text)
    assert number is None or part is not None
    assert grade(7, text.replace("\\", "")) in (0.0, 1.0)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-9, 9), st.sampled_from(["x", "y", "x^{2}", r"\sqrt{3}", ""])), min_size=1, max_size=4
    )
)
def test_sums_in_another_order_are_equal_as_sympy_says(terms):
    """Against sympy's own algebra, on the terms and not on their LaTeX."""
    pytest.importorskip("math_verify", reason="the optional package math-verify is not installed")
    import sympy

    x, y = sympy.symbols("x y")
    values = {"x": x, "y": y, "x^{2}": x**2, r"\sqrt{3}": sympy.sqrt(3), "": 1}
    written = [f"({factor}){name}" for factor, name in terms]
    truth, response = " + ".join(written), " + ".join(reversed(written))
    total = sum(factor * values[name] for factor, name in terms)
    assert grade(truth, rf"\boxed{{{response}}}") == 1.0
    more = rf"\boxed{{{response} + x}}"
    assert grade(truth, more) == 0.0
    assert grade(str(sympy.expand(total)), rf"\boxed{{{response}}}") == 1.0


HARD = [("9999999!", "8888888!"), ("10^{10^{10}}", "9^{10^{10}}"), ("(" * 200 + "x" + ")" * 200, "y")]


def test_nothing_holds_a_run_up(math_verify):
    """Factorials and towers of powers are stopped by the kernel, while C computes; the rest goes on."""
    workers = Workers("math", row_time_limit_s=0.5)
    start = time.monotonic()
    answers = workers.ask([["x+1", "1+x"], *HARD, ["x+1", "x"], ["\\frac12", None], ["???", None]])
    assert answers[0] is True and answers[1] is None and answers[4:] == [False, True, False]
    assert not any(answers[2:4]) and time.monotonic() - start < 60
    workers.close()


def test_any_thread_may_ask_and_so_may_a_fork(math_verify):
    workers, found = Workers("math"), []
    thread = threading.Thread(target=lambda: found.append(workers.ask([["x+1", "1+x"]])))
    thread.start()
    thread.join()
    assert found == [[True]] and workers.ask([["x+2", "2+x"]]) == [True]  # the process outlives the thread
    child = os.fork()
    if child == 0:
        os._exit(workers.ask([["x+3", "3+x"], ["x", "y"]]) != [True, False])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert workers.ask([["x+4", "4+x"]]) == [True]
    workers.close()
    assert workers.ask([["x+5", "5+x"]]) == [True]  # started again
    workers.close()


def test_a_process_that_breaks_down_is_replaced(math_verify, monkeypatch):
    workers = Workers("math")
    assert workers.ask([["x+1", "1+x"]]) == [True]
    workers.workers[0].process.kill()
    assert workers.ask([["x+1", "1+x"]]) == [True]
    workers.close()
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    with pytest.raises(SandboxError, match=r"(?s)that checks rows by math does not start: .*No module named"):
        workers.ask([["x", "x"]])


def test_where_the_process_cannot_be_confined_nothing_is_computed(math_verify, tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text(
        f"import sys; sys.path.insert(0, {str(Path(sandbox.__file__).parent)!r})\n"
        "import platform; platform.machine = lambda: 'pdp11'\nimport sandbox_child; sandbox_child.main()"
    )
    monkeypatch.setattr(workers_module, "CHILD", child)
    with pytest.raises(SandboxError, match="cannot confine a process, so no code is run: the system calls of pdp11"):
        Workers("math").ask([["x", "x"]])


def test_answers_are_remembered(math_verify, monkeypatch):
    asked = []

    def ask(questions):
        asked.extend(questions)
        return [True] * len(questions)

    monkeypatch.setattr(expressions, "_known", {})
    monkeypatch.setattr(expressions._workers, "ask", ask)
    for _ in range(2):
        math_answer(["?"] * 3, [r"\boxed{1+a}", r"\boxed{1+a}", r"\boxed{a}"], [[]] * 3, answer=["a+1"] * 3)
    assert asked == [("a+1", None), ("a+1", "1+a"), ("a+1", "a")]


def checked(functions, rows, **options):
    rows = [{"at": f"file:{number}", **row} for number, row in enumerate(rows, 1)]
    return row_checks.unusable(functions, row_checks.results(functions, rows), rows, **options)


SCHEMA = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}


@pytest.mark.parametrize(
    "function, good, bad",
    [
        (regex, ["a+", "(?s).*"], {"(": "is not a regular expression", 3: "pattern: got 3, wants a string"}),
        (
            unit_test,
            ["assert f(2) == 4"],
            {"assert (": "test: is not Python", "x\0": "test: is not Python", 3: "string"},
        ),
    ],
)
def test_rows_are_checked_before_anything_is_trained(function, good, bad):
    name = {"regex": "pattern", "unit_test": "test"}[function.__name__]
    rows = [{name: entry} for entry in (*good, *bad)]
    found = checked({function.__name__: function}, rows)
    assert list(found) == list(range(len(good), len(rows)))
    for reason, wanted in zip(found.values(), bad.values(), strict=True):
        assert reason.startswith(f"{function.__name__}: ") and wanted in reason


def test_schemas_are_checked(monkeypatch):
    pytest.importorskip("jsonschema", reason="the optional package jsonschema is not installed")
    data = {"enum": [{"$ref": "nowhere"}]}  # no reference: a value
    good = [SCHEMA, json.dumps(SCHEMA), True, {"$ref": "#"}, data, {"properties": {"$ref": {"type": "string"}}}]
    good.append({"$ref": "https://json-schema.org/draft/2020-12/schema"})
    bad = {
        '{"type": ': "is not JSON", '{"type": "number of cows"}': "is not a JSON schema", "[1]": "wants a JSON schema",
        '{"items": {"$ref": "#/$defs/x"}}': "refers to a schema that is not in it",
        '{"anyOf": [{"$ref": "http://localhost/other.json"}]}': "refers to a schema that is not in it",
    }  # fmt: skip
    found = checked({"json_schema": json_schema}, [{"schema": schema} for schema in (*good, *bad)])
    assert list(found) == list(range(len(good), len(good) + len(bad)))
    assert all(wanted in reason for reason, wanted in zip(found.values(), bad.values(), strict=True))
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    assert "needs the package jsonschema" in checked({"json_schema": json_schema}, [{"schema": True}])[0]


def test_rows_without_a_reward(math_verify, caplog):
    rows = [{"answer": "1"}, {"answer": "???"}, {"test": "assert 1"}, {}, {"answer": "x", "test": "("}]
    both = {"math_answer": math_answer, "unit_test": unit_test}
    found = checked(both, rows)
    assert list(found) == [1, 3, 4]
    assert found[1].startswith("math_answer: answer: got '???', which cannot be read")
    silent = "math_answer: the row has no `answer` or `solution`; unit_test: the row has no `test`"
    assert found[3] == f"{silent}, and nothing else rewards the row"
    assert found[4].startswith("unit_test: test: is not Python (SyntaxError")  # wrong, whatever else rewards it
    with caplog.at_level(logging.WARNING):
        assert list(checked(both, rows, has_reward_model=True)) == [4]
        assert list(checked({**both, "mine": lambda **columns: None}, rows)) == [4]
    assert caplog.text.count("math_answer says nothing about 1 of 5 rows:\nfile:2: answer: got '???'") == 2
    with pytest.raises(ValueError, match="unit_test: the data have no column `test`"):
        checked(both, rows[:2])


def test_functions_of_the_user_may_check_too():
    class Judge:
        def __call__(self, prompts, completions, completion_ids, **columns):
            return [1.0] * len(prompts)

        def check(self, row):
            if row["level"] < 0:
                raise ValueError(f"level: got {row['level']}, wants a number >= 0")
            if row["level"] == 9:
                raise NoReward("level 9 has none")

    found = checked({"Judge": Judge()}, [{"level": 1}, {"level": -1}, {}, {"level": 9}])
    assert found == {
        1: "Judge: level: got -1, wants a number >= 0",
        2: "Judge: its check raised KeyError: 'level'",
        3: "Judge: level 9 has none, and nothing else rewards the row",
    }
    fixed = functools.partial(functools.partial(regex, pattern="("), pattern="a")
    assert checked({"regex": fixed}, [{}, {"pattern": "("}]) == {
        1: "regex: pattern: '(' is not a regular expression (missing ), unterminated subpattern at position 0)"
    }
    assert row_checks.results({"f": lambda **columns: None}, [{}]) == {}
