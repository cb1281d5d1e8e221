"""Files of rows: every format gives the same rows, with their places, and a large file is read piece by piece."""

import bz2
import csv
import gzip
import importlib
import io
import itertools
import json
import lzma
import pickle
import re
import sys
import tracemalloc

import pytest

from rlhf import data
from rlhf.data import files, readers, streams
from rlhf.data.json_text import Document
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


@pytest.fixture
def pyarrow():
    package = pytest.importorskip("pyarrow", reason="needs the optional package pyarrow")
    for part in ("feather", "ipc", "parquet"):
        importlib.import_module(f"pyarrow.{part}")
    return package


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Files are read in blocks of 3 bytes, so that everything stands across their borders."""
    monkeypatch.setattr(streams, "BLOCK", 3)


def csv_text(table, **options):
    out = io.StringIO()
    csv.writer(out, **options).writerows(table)
    return out.getvalue()


def written(folder):
    """The rows in every format, by the programs that write it: {file: the places of the rows}."""
    table = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    by_line = "".join(json.dumps(row) + "\n" for row in ROWS)
    texts = {
        "a.jsonl": by_line,
        "a.ndjson": by_line,
        "lines.json": by_line,
        "list.json": json.dumps(ROWS, indent=1),
        "data.json": json.dumps({"version": {"data": [1]}, "data": ROWS}),
        "splits.json": json.dumps({"test": ROWS[:1], "train": ROWS}),
        "a.csv": csv_text(table),
        "a.tsv": csv_text(table, delimiter="\t", lineterminator="\n"),
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        (folder / f"{name}.bz2").write_bytes(bz2.compress(text.encode()))
        (folder / f"{name}.xz").write_bytes(lzma.compress(text.encode()))
    return [name + packed for name in texts for packed in ("", ".gz", ".bz2", ".xz")]


def test_all_formats_give_the_same_rows(tmp_path):
    for name in written(tmp_path):
        assert rows(tmp_path / name) == ROWS, name


def test_tables_of_arrow_give_the_same_rows(tmp_path, pyarrow):
    table = pyarrow.Table.from_pylist([*ROWS, {"prompt": None, "completion": "no prompt"}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    pyarrow.feather.write_feather(table, tmp_path / "a.feather")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    for name in ("a.parquet", "a.feather", "a.arrow"):
        assert rows(tmp_path / name) == [*ROWS, {"completion": "no prompt"}]
        assert lines(tmp_path / name) == [1, 2, 3, 4, 5]


def test_zstd(tmp_path, pyarrow):
    halves = ["".join(json.dumps(row) + "\n" for row in half).encode() for half in (ROWS[:1], ROWS[1:])]
    frames = [pyarrow.compress(half, codec="zstd", asbytes=True) for half in halves]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert rows(tmp_path / "a.jsonl.zst") == ROWS and lines(tmp_path / "a.jsonl.zst") == [1, 2, 3, 4]


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_what_needs_a_package_says_so(tmp_path, monkeypatch, package):
    """Without it the formats of text are read as ever."""
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, package, None)
    assert rows(tmp_path / "a.jsonl") == ROWS
    names = {"pyarrow": ["a.jsonl.zst", "a.parquet"], "datasets": []}[package]
    for name in names:
        with pytest.raises(data.DataError, match=rf"{name}.*needs the package pyarrow"):
            rows(tmp_path / name)
    if package == "datasets":
        with pytest.raises(data.DataError, match=r"some/name: no such file.*`datasets`.*not installed"):
            rows("some/name")


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz", "zst", "parquet", "feather", "arrow"])
def test_half_a_file_is_an_error_that_names_it(tmp_path, pyarrow, packed):
    """At whatever byte it is cut; the rest was not downloaded."""
    body = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    if packed in ("gz", "bz2", "xz"):
        content = {"gz": gzip, "bz2": bz2, "xz": lzma}[packed].compress(body)
    else:
        table, out = pyarrow.Table.from_pylist(ROWS), pyarrow.BufferOutputStream()
        if packed == "parquet":
            pyarrow.parquet.write_table(table, out)
        elif packed == "feather":
            pyarrow.feather.write_feather(table, out)
        elif packed == "arrow":
            with pyarrow.ipc.new_stream(out, table.schema) as stream:
                stream.write_table(table, max_chunksize=2)
        content = pyarrow.compress(body, codec="zstd", asbytes=True) if packed == "zst" else bytes(out.getvalue())
    path = tmp_path / (f"a.{packed}" if packed in ("parquet", "feather", "arrow") else f"a.jsonl.{packed}")
    path.write_bytes(content)
    assert rows(path) == ROWS
    for length in [0, *range(8, len(content), max(1, len(content) // 40)), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(data.DataError, match=re.escape(str(path))):
            rows(path)


def test_the_content_tells_how_a_file_is_packed(tmp_path):
    """Some programs unpack what they fetch and keep its name, some do not."""
    body = json.dumps(ROWS[0]).encode()
    (tmp_path / "plain.jsonl.gz").write_bytes(body)
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(body))
    assert rows(tmp_path / "plain.jsonl.gz") == rows(tmp_path / "packed.jsonl") == ROWS[:1]


def test_a_pointer_of_git_lfs_is_no_data(tmp_path):
    for name in ("a.jsonl", "a.parquet", "a.txt"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(data.DataError, match=rf"{name}: is a pointer of Git LFS.*git lfs pull"):
            rows(tmp_path / name, "text")


def test_a_table_of_text(tmp_path, tiny_blocks):
    """Quotes, separators and line ends within cells, a byte order mark, the column of numbers that pandas writes."""
    cells = ["a, b", 'say "hi"', "two\nlines", "crlf\r\nin a cell", "", "[1, 2]", "7", "t\tab", "é"]
    table = [["", "prompt", "completion"], *([str(i), cell, "y"] for i, cell in enumerate(cells))]
    for name, delimiter, end in (("a.csv", ",", "\r\n"), ("a.tsv", "\t", "\n")):
        text = "\ufeff" + csv_text(table, delimiter=delimiter, lineterminator=end)
        (tmp_path / name).write_bytes(text.encode())
        assert rows(tmp_path / name) == [{"prompt": cell, "completion": "y"} for cell in cells]
        assert lines(tmp_path / name) == [2, 3, 4, 6, 8, 9, 10, 11, 12]


def test_a_cell_as_long_as_a_book(tmp_path):
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert rows(tmp_path / "a.csv", "text") == [{"text": "x" * 200_000}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt,completion\na,b\nc\n", r"a\.csv:3: has 1 cells, the first row has 2"),
        ("prompt,completion\n\na,b,c\n", r"a\.csv:3: has 3 cells, the first row has 2"),
        ('prompt,completion\na,b\n"c\n\n', r"a\.csv:3: is not a row of cells \(unexpected end of data\)"),
        ('prompt,completion\n"a"b,c\n', r"a\.csv:2: is not a row of cells"),
        ("prompt,prompt\na,b\n", r"a\.csv:1: the first row names 'prompt' twice"),
        (",\na,b\n", r"a\.csv:1: the first row names no column"),
        ("prompt;completion\na;b\n", r"a\.csv:1: got 'prompt;completion' as the only column, wants ',' between"),
        ("prompt\tcompletion\na\tb\n", r"a\.csv:1: got .* as the only column"),
        ("prompt,completion\n", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_bad_tables_of_text(tmp_path, text, reason):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(data.DataError, match=reason):
        data.load_rows(tmp_path / "a.csv", "sft")


def test_cells_that_hold_numbers_and_lists(tmp_path):
    """A table of text has text alone: what our fields want otherwise is read, and an empty cell is an absent field."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "[1]"}]
    tables = {
        "ranked": [
            ["prompt", "completions", "ranks", "weight", "margin"],
            ["7", '["[1]", "2"]', "[0, 1]", "2.5", ""],
            ["a", '["b", "c"]', "[1, 0]", "", "3"],
        ],
        "unpaired": [
            ["prompt", "completion", "label"],
            *(["a", "7", label] for label in ("True", "false", "1", "0.0")),
        ],
        "sft": [["messages"], [json.dumps(messages)]],
    }
    found = {}
    for kind, table in tables.items():
        (tmp_path / "a.csv").write_bytes(csv_text(table).encode())
        found[kind] = [{k: v for k, v in row.items() if k != "at"} for row in data.load_rows(tmp_path / "a.csv", kind)]
    assert found["ranked"][0] == {"prompt": "7", "completions": ["[1]", "2"], "ranks": [0, 1], "weight": 2.5}
    assert found["ranked"][1] == {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 0], "margins": [[3.0] * 2] * 2}
    assert [row["label"] for row in found["unpaired"]] == [True, False, True, False]
    assert {row["completion"] for row in found["unpaired"]} == {"7"}
    assert found["sft"] == [{"prompt": messages[:1], "completion": messages[1:]}]
    (tmp_path / "a.csv").write_text("prompt,label\na,7\n")
    assert data.load_rows(tmp_path / "a.csv", "prompts", columns=True)[0]["label"] == "7"


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.txt"])
def test_text_that_is_not_utf8(tmp_path, name, encoding):
    text = {"a.csv": "text\né\n", "a.json": '[\n{"text": "é"}]', "a.jsonl": '\n{"text": "é"}', "a.txt": "a\né"}[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    line = 1 if encoding == "utf-16" else 2
    with pytest.raises(data.DataError, match=rf"{re.escape(name)}:{line}: .*UTF-8"):
        data.load_rows(tmp_path / name, "text")


DOCUMENTS = [
    '[{"a": 1}, {"a": [1, {"b": "]}, {"}]}, {}]',
    '\n [\n{"a": -12.5e3},\n\n{"a": "x\\"y\\u00e9"} ,{"a": null}\n]\n',
    "[]",
    " [ ] ",
    '[1, "two", null, [3], 12345678901234567890, true, -Infinity]',
    '{"a": {"data": [{"b": 1}]}, "data": 3}',
    '{\n"messages": [{"role": "user"}]}',
    "{}",
    '"text"',
    "17",
]


@pytest.mark.parametrize("text", DOCUMENTS)
@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_a_json_document_in_pieces(text, size):
    blocks = (text[start : start + size] for start in range(0, len(text), size))
    whole = json.loads(text)
    expected = whole if isinstance(whole, list) else [whole]
    assert [row for _, row in Document("a.json", blocks).rows("train")] == expected


def test_rows_of_a_json_document_are_on_their_lines(tmp_path):
    def places(text, split="train"):
        (tmp_path / "a.json").write_text(text)
        return [at.removeprefix(f"{tmp_path}/a.json:") for at, _ in read(tmp_path / "a.json", "sft", split)]

    assert places('[\n  {"a": 1},\n  {"a":\n 2},\n\n  {"a": 3}]') == ["2", "3", "6"]
    assert places('[{"a": 1}, {"a": 2}, {"a": 3},\n{"a": 4}]') == ["1", "1 (row 2)", "1 (row 3)", "2"]
    assert places('{"test": [{"a": 0}],\n "train": [{"a": 1},\n{"a": 2}]}') == ["2", "3"]
    assert places('\n\n{"test": [{"a": 0}],\n "train": [{"a": 1},\n{"a": 2}]}', "validation") == ["3"]


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    "text", ['[{"a": 1}', '[{"a": 1},\n]', '[\n{"a" 1}]', '[{"a": 1}]\n]', '{"a": [1,}', '["a', "[1 2]", "[,1]", "nul"]
)
def test_a_bad_json_document(text, size):
    """The line is that of Python's own parser."""
    with pytest.raises(json.JSONDecodeError) as own:
        json.loads(text)
    blocks = (text[start : start + size] for start in range(0, len(text), size))
    with pytest.raises(data.DataError, match=rf"^a\.json:{own.value.lineno}: is not JSON \("):
        list(Document("a.json", blocks).rows("train"))


def test_a_long_json_list_is_not_held_whole(tmp_path):
    with open(tmp_path / "a.json", "w") as file:
        file.write("[" + ",\n".join(json.dumps({"text": "a" * 1000}) for _ in range(15_000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in files.read(str(tmp_path / "a.json"), "text", "train", None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 15_000 and peak < 9e6


def test_plain_text_in_pieces(tmp_path, tiny_blocks):
    """As Python cuts the whole: at empty lines, or at the mark where it stands anywhere."""
    for mark in ("\n\n", "<|endoftext|>"):
        for end in ("\n", "\r\n", "\r"):
            text = mark.join(["one", "two\nlines", "\n é", "four\n", "", "six\n\n" if mark != "\n\n" else "six"])
            expected = [piece.strip() for piece in text.split(mark) if piece.strip()]
            (tmp_path / "a.txt").write_bytes(text.replace("\n", end).encode())
            assert [row["text"] for row in rows(tmp_path / "a.txt", "text")] == expected
    (tmp_path / "a.txt").write_bytes(b"First.\r\n\r\nSecond.\r\n\r\nThird.\r\n")
    assert lines(tmp_path / "a.txt", "text") == [1, 3, 5]


def test_a_mark_that_comes_late_in_plain_text_is_an_error(tmp_path, monkeypatch):
    """What it parts would have been cut at empty lines up to there."""
    monkeypatch.setattr(readers, "LOOK_AHEAD", 10)
    monkeypatch.setattr(streams, "BLOCK", 5)
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree\n\nfour<|endoftext|>five")
    with pytest.raises(data.DataError, match=r"a\.txt:7: holds <\|endoftext\|>"):
        rows(tmp_path / "a.txt", "text")
