"""Files of rows: every format gives the same rows, with their places, and a large file is read piece by piece."""

import itertools
import json
import pickle
import tracemalloc

import pytest

from rlhf import data
from rlhf.data import files
from tests.tiny import write_jsonl

ROWS = [{"prompt": f"Name number {number}.", "completion": f"It is {number}."} for number in range(4)]


def read(path, kind="sft", split="train", config=None):
    return list(files.read(str(path), kind, split, config))


def rows(path, *arguments):
    return [row for _, row in read(path, *arguments)]


def lines(path, *arguments):
    """The numbers behind the last colon of each row's place."""
    return [int(at.rpartition(":")[2]) for at, _ in read(path, *arguments)]


def test_chunks_of_lines_are_parsed_by_whoever_gets_them(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS[:2], "", "{", *ROWS[2:]])
    (chunk,) = files.read_chunks(path, "sft", "train", None)
    assert chunk.lines == (tmp_path / "a.jsonl").read_bytes() and chunk.found == ()
    found = list(pickle.loads(pickle.dumps(chunk)).rows())
    assert [at for at, _ in found] == [f"{path}:{line}" for line in (1, 2, 4, 5, 6)]
    assert [row for _, row in found if isinstance(row, dict)] == ROWS
    assert isinstance(found[2][1], files.Bad) and "is not JSON" in str(found[2][1])


def test_a_large_file_of_lines_is_not_held_whole(tmp_path):
    """40 MB in lines of 1 kB and one of 3 MB: chunks of whole lines, whose numbers go on."""
    line = json.dumps({"text": "a" * 1000}) + "\n"
    with open(tmp_path / "a.jsonl", "w") as file:
        file.write(json.dumps({"text": "b" * 3_000_000}) + "\n")
        file.writelines(itertools.repeat(line, 37_000))
    tracemalloc.start()
    expected = 1
    for chunk in files.read_chunks(str(tmp_path / "a.jsonl"), "text", "train", None):
        assert chunk.first == expected and chunk.lines.endswith(b"}\n")
        expected += chunk.lines.count(b"\n")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert expected == 37_002 and peak < 10e6


def test_json_lines_under_the_name_json(tmp_path):
    (tmp_path / "a.json").write_text("\n" + "".join(json.dumps(row) + "\n\n" for row in ROWS))
    assert rows(tmp_path / "a.json") == ROWS and lines(tmp_path / "a.json") == [2, 4, 6, 8]
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=1))
    (tmp_path / "line.json").write_text(json.dumps(ROWS[0]))
    assert rows(tmp_path / "one.json") == rows(tmp_path / "line.json") == ROWS[:1]


def test_lines_that_are_not_utf8_are_named_and_the_others_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "é"}\n'.encode() + b'{"text": "\xe9"}\n{"text": "c"}')
    found = read(tmp_path / "a.jsonl", "text")
    assert found[0] == (f"{tmp_path}/a.jsonl:1", {"text": "é"}) and found[2][1] == {"text": "c"}
    assert str(found[1][1]).startswith("is not UTF-8 text")
    with pytest.raises(data.DataError, match=r"a\.jsonl:2: is not UTF-8 text"):
        data.load_rows(tmp_path / "a.jsonl", "text")


def test_the_fingerprint_tells_files_apart(tmp_path):
    first, second = (write_jsonl(tmp_path / name, ROWS) for name in ("a.jsonl", "b.jsonl"))
    before = files.fingerprint(first, "train", None)
    assert json.loads(json.dumps(before)) == before == files.fingerprint(first, "train", None)
    assert files.fingerprint(second, "train", None) != before
    assert files.size(first, "train", None) == (tmp_path / "a.jsonl").stat().st_size
    write_jsonl(tmp_path / "a.jsonl", ROWS[:3])
    assert files.fingerprint(first, "train", None) != before
