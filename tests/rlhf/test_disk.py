"""Files where the disk is full, or a write takes less than it was given; text that has many kinds of line ends."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf import disk

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 20_000
FULL = f"""
import signal, resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, {LIMIT}))
"""


@pytest.fixture
def full_disk():
    """Files of this process cannot grow beyond LIMIT bytes, which the system reports as it reports a full disk."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1][1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path, full_disk):
    disk.write_bytes(tmp_path / "a.json", b"old")
    with pytest.raises(disk.WriteError) as caught:
        disk.write_bytes(tmp_path / "a.json", b"x" * (LIMIT + 1))
    assert str(caught.value) == f"{tmp_path / 'a.json'}: cannot be written (File too large)"
    assert caught.value.errno == errno.EFBIG and isinstance(caught.value, OSError)
    assert (tmp_path / "a.json").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]


def test_rows_that_do_not_fit_leave_the_log_as_it_was(tmp_path, full_disk):
    """The system takes what still fits before it says that the disk is full."""
    path = tmp_path / "metrics.jsonl"
    first = b"1" * (LIMIT - 10) + b"\n"
    disk.append_bytes(path, first)
    with pytest.raises(disk.WriteError, match=r"metrics.jsonl: cannot be written \(File too large\)"):
        disk.append_bytes(path, b"2" * 30 + b"\n")
    assert path.read_bytes() == first
    disk.append_bytes(path, b"3\n")
    assert path.read_bytes() == first + b"3\n"


def test_a_write_that_takes_less_goes_on():
    taken = []

    class Slow:
        def write(self, content):
            taken.append(bytes(content[:3]))
            return len(taken[-1])

    disk.write_all(Slow(), b"abcdefgh")
    assert taken == [b"abc", b"def", b"gh"]


WRITERS = {
    "safetensors": "from safetensors.torch import save_file\nsave_file({'x': torch.zeros(20_000)}, path)",
    "torch": "torch.save({'x': torch.zeros(20_000)}, path)",
    "tokenizers": (
        "from tokenizers import Tokenizer, models\n"
        "Tokenizer(models.WordLevel({str(i): i for i in range(20_000)}, unk_token='0')).save(path)"
    ),
    "python": "open(path, 'w').write('x' * 100_000)",
}


def test_every_writer_names_the_path(tmp_path):
    script = f"import torch\nfrom rlhf.disk import writing\n{FULL}\n"
    for name, body in WRITERS.items():
        body = body.replace("\n", "\n        ")
        script += f"""
path = {str(tmp_path / name)!r}
try:
    with writing({name!r}):
        {body}
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    causes = dict.fromkeys(WRITERS, "File too large") | {"torch": "writing stopped half-way; is the disk full?"}
    assert done.stdout.split("\n")[:-1] == [f"{name}: cannot be written ({causes[name]})" for name in WRITERS], done


def test_other_errors_go_through():
    with pytest.raises(RuntimeError, match=r"^no$"), disk.writing("x"):
        raise RuntimeError("no")
    with pytest.raises(KeyError), disk.writing("x"):
        raise KeyError("y")


def test_lines_end_at_a_line_feed_only(tmp_path):
    marks = "\u2028\u2029\x85\x0b\x0c\x1c\r"
    rows = [{"text": f"a{mark}b"} for mark in marks]
    (tmp_path / "log").write_bytes(b"".join(map(disk.json_bytes, rows)) + '{"torn é'.encode()[:-1])
    lines = disk.lines_of(tmp_path / "log")
    assert [json.loads(line) for line in lines[:-1]] == rows and not lines[-1].endswith("\n")
    assert "\u2028" in lines[0]  # as it is: people read these files
    (tmp_path / "empty").touch()
    assert disk.lines_of(tmp_path / "empty") == []


def test_json_has_no_nan_and_takes_any_text():
    value = {"a": [1.0, float("nan"), (float("inf"),)], "b": "é \ud83d", "c": {"d": -float("inf")}, "e": True}
    found = json.loads(disk.json_bytes(value), parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": [1.0, None, [None]], "b": "é \ud83d", "c": {"d": None}, "e": True}


@pytest.mark.parametrize("name", ["run", "n" * 255, "é" * 127, "n" + "é" * 127])
def test_temporary_names_fit(tmp_path, name):
    found = disk.temporary_name(name)
    assert disk.TEMPORARY_NAME.fullmatch(found) and disk.TEMPORARY_NAME.fullmatch(found + "-old")
    (tmp_path / (found + "-old")).touch()


def test_an_output_file_is_tried_before(tmp_path):
    old = tmp_path / "old.jsonl"
    old.write_text("kept")
    assert disk.prepare_output_file(old) == old and old.read_text() == "kept"
    new = disk.prepare_output_file(tmp_path / "no" / "such" / "x.jsonl")
    assert new.parent.is_dir() and not new.exists()
    with pytest.raises(ValueError, match=r"output_file: .* is a directory; give a file"):
        disk.prepare_output_file(tmp_path)
    with pytest.raises(
        ValueError, match=r"output_file: .*old.jsonl/x cannot be written \((Not a directory|File exists)"
    ):
        disk.prepare_output_file(old / "x")
    assert sorted(os.listdir(tmp_path)) == ["no", "old.jsonl"]
