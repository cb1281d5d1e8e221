"""Entries of the cache directory are whole or absent, found again, and no others' files are touched."""

import json
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.data import cache
from rlhf.disk import WriteError, writing
from tests.rlhf.test_disk import FULL, LIMIT, ROOT

DAY = 24 * 60 * 60


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def maker(text, made):
    def make(folder):
        made.append(text)
        with writing(folder):
            (folder / "data").write_text(text)
        return {"length": len(text)}

    return make


def test_an_entry_is_made_once_for_each_key(base):
    made = []
    first, said = cache.entry("rows", ["a", 1], maker("one", made))
    again, said_again = cache.entry("rows", ["a", 1], maker("two", made))
    other, _ = cache.entry("rows", ["a", 2], maker("three", made))
    assert first == again and first.parent == base and (first / "data").read_text() == "one"
    assert said == said_again == {"length": 3} and made == ["one", "three"] and other != first
    assert stat.S_IMODE(first.stat().st_mode) == 0o700


@pytest.mark.parametrize("damage", ["cut", "gone", "no content", "torn content"])
def test_a_damaged_entry_is_made_again(base, damage):
    made = []
    path, _ = cache.entry("rows", "key", maker("whole", made))
    if damage == "cut":
        (path / "data").write_text("who")
    elif damage == "gone":
        (path / "data").unlink()
    elif damage == "no content":
        (path / "content.json").unlink()
    else:
        (path / "content.json").write_text('{"files": {')
    again, said = cache.entry("rows", "key", maker("whole", made))
    assert again == path and (path / "data").read_text() == "whole" and said == {"length": 5} and len(made) == 2
    assert [entry.name for entry in base.iterdir()] == [path.name]


def test_what_fails_leaves_nothing(base):
    def make(folder):
        (folder / "data").write_text("half")
        raise ValueError("row 3")

    with pytest.raises(ValueError, match="row 3"):
        cache.entry("rows", "key", make)
    assert not list(base.iterdir())


def test_entries_that_nobody_used_for_30_days_go_when_one_is_written(base):
    made = []
    paths = [cache.entry("rows", number, maker("x", made))[0] for number in range(3)]
    mine, unfinished = base / "rows-of-mine", base / f".{paths[0].name}.tmp-abc123"
    for folder in (mine, unfinished):
        folder.mkdir()
    now = time.time()
    for path, days in (
        (paths[0] / "content.json", 31),
        (paths[1] / "content.json", 31),
        (paths[2] / "content.json", 29),
    ):
        os.utime(path, (now - days * DAY,) * 2)
    for path in (mine, unfinished):
        os.utime(path, (now - 40 * DAY,) * 2)
    cache.entry("rows", 1, maker("x", made))  # opened: in use again
    assert len(made) == 3 and paths[0].exists()
    cache.entry("rows", 4, maker("x", made))
    assert [path.exists() for path in (*paths, mine, unfinished)] == [False, True, True, True, False]


def test_a_directory_that_cannot_be_written_is_told_and_a_temporary_one_used(tmp_path, monkeypatch, caplog):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("RLHF_CACHE", str(file / "cache"))
    made = []
    path, _ = cache.entry("rows", "key", maker("one", made))
    assert (path / "data").read_text() == "one" and path.parent == cache.temporary()
    assert f"{file / 'cache'}: cannot be written (Not a directory); a temporary directory is used" in caplog.text
    assert "RLHF_CACHE names another cache directory" in caplog.text
    again, _ = cache.entry("rows", "key", maker("two", made))
    assert again == path and made == ["one"]
    cache.entry("ids", "key", maker("three", made))
    assert made == ["one", "three"] and caplog.text.count("cannot be written") == 1


OFF = """
import sys
from rlhf.data import cache
made = []
def make(folder):
    (folder / "data").write_text("x")
    made.append(folder)
    return {}
first = cache.entry("rows", "key", make)[0]
assert cache.entry("rows", "key", make)[0] == first and len(made) == 1
print(first)
"""


@pytest.mark.parametrize("value", ["off", "0"])
def test_no_cache_is_a_temporary_directory_that_goes_with_the_process(tmp_path, value):
    environment = {**os.environ, "RLHF_CACHE": value, "TMPDIR": str(tmp_path), "HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", OFF], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).parent.parent == tmp_path and not list(tmp_path.iterdir())


FULL_DISK = f"""
import sys
{FULL}
from rlhf.data import cache
from rlhf.disk import WriteError, write_all, writing
def make(folder):
    with writing(folder / "data"), open(folder / "data", "wb", buffering=0) as file:
        write_all(file, bytes({LIMIT} + 1))
    return {{}}
try:
    cache.entry("rows", "key", make)
except WriteError as error:
    print(error)
"""


def test_a_full_disk_is_told_by_name(tmp_path):
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "RLHF_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert str(tmp_path / "temporary") in done.stdout and "cannot be written (File too large)" in done.stdout
    assert "a temporary directory is used" in done.stderr
    assert not list((tmp_path / "cache").iterdir()) and not list((tmp_path / "temporary").iterdir())


def test_where_the_cache_directory_is(monkeypatch):
    for given, base, expected in (
        ("/a/b", "/x", Path("/a/b")),
        ("", "/x", Path("/x/rlhf")),
        ("", "relative", Path("/home/me/.cache/rlhf")),
        ("", "", Path("/home/me/.cache/rlhf")),
        ("~/c", "", Path("/home/me/c")),
        ("OFF", "/x", None),
    ):
        monkeypatch.setenv("HOME", "/home/me")
        monkeypatch.setenv("RLHF_CACHE", given)
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert cache.home() == expected


def _make_slowly(queue, ready, go):
    def make(folder):
        ready.release()
        go.wait(30)
        (folder / "data").write_text(str(os.getpid()))
        return {"by": os.getpid()}

    path, said = cache.entry("rows", "key", make)
    queue.put((str(path), (path / "data").read_text(), said["by"]))


def test_two_processes_may_make_the_same_entry_at_once(base):
    context = multiprocessing.get_context("fork")
    queue, ready, go = context.Queue(), context.Semaphore(0), context.Event()
    processes = [context.Process(target=_make_slowly, args=(queue, ready, go)) for _ in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        assert ready.acquire(timeout=30)  # both are at work
    go.set()
    found = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(30)
    assert len({path for path, *_ in found}) == 1 and [entry.name for entry in base.iterdir()] == [
        Path(found[0][0]).name
    ]
    kept = json.loads((Path(found[0][0]) / "content.json").read_text())["said"]["by"]
    assert kept in {by for *_, by in found} and (Path(found[0][0]) / "data").read_text() == str(kept)


def test_a_write_error_of_the_maker_is_not_taken_for_an_error_of_its_data(base):
    def make(folder):
        raise FileNotFoundError(2, "No such file or directory", "input.jsonl")

    with pytest.raises(FileNotFoundError, match="input"):
        cache.entry("rows", "key", make)
    assert issubclass(WriteError, OSError)
