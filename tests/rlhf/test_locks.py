"""One run at a time in a folder: refused while another process writes there, free as soon as it is gone."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf import checkpoint, evaluate, locks
from rlhf.ppo import train_ppo
from rlhf.stages import Stage, Stages
from tests.tiny_ppo import own_home, write_files

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys
from rlhf import locks
locks.hold(sys.argv[1], is_file=sys.argv[2] == "file")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """other(place, "file" or "folder") -> a process that holds its lock."""
    started = []

    def start(place, kind="folder"):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(place), kind], env=environment, **pipes)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_a_folder_is_free_when_its_process_has_ended(tmp_path, other, end):
    run = tmp_path / "run"
    process = other(run)
    with pytest.raises(
        ValueError, match=rf"^output_dir: {run} is being written by process {process.pid} of \S+; wait "
    ):
        checkpoint.prepare_output_dir(run, resume=True)
    process.kill() if end == "kill" else process.stdin.close()
    process.wait()
    assert names(run) == ([locks.LOCK] if end == "kill" else [])
    checkpoint.prepare_output_dir(run, resume=True)
    assert (run / locks.LOCK).read_text().startswith(f"process {os.getpid()} of ")
    checkpoint.prepare_output_dir(run, resume=True)  # its own process may come again
    locks.release(run)
    assert names(run) == []


def test_a_run_that_is_refused_leaves_no_lock(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds a run"):
        checkpoint.prepare_output_dir(tmp_path, resume=False)
    assert names(tmp_path) == ["run.json"]


def test_links_are_the_folder_that_they_point_to(tmp_path, other):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    other(tmp_path / "run")
    with pytest.raises(ValueError, match="link is being written by process"):
        locks.hold(tmp_path / "link")


def test_forked_processes_hold_nothing(tmp_path, other):
    """Such as workers that load data, and may outlive a run that was killed."""
    locks.hold(tmp_path)
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        locks.release(tmp_path)
        other(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def none(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    monkeypatch.setattr(locks.logger, "propagate", True)
    locks.hold(tmp_path)
    assert "is on a file system without locks" in caplog.text
    locks.release(tmp_path)


def test_a_pipeline_has_its_folder_for_itself(tmp_path, other):
    plan, run = [Stage("a", "A")], tmp_path / "run"
    stages = Stages(run, plan, {"x": 1})
    stages.run("a", lambda folder: folder.mkdir() or "done")
    assert set(names(run)) == {locks.LOCK, "a", "log.txt", "pipeline.json"}
    again = Stages(run, plan, {"x": 2}, overwrite=True)
    assert set(names(run)) == {locks.LOCK, "pipeline.json"}
    del stages, again
    assert names(run) == ["pipeline.json"]
    other(run)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is being written by process"):
            Stages(run, plan, {"x": 2}, overwrite=overwrite)
    assert set(names(run)) == {locks.LOCK, "pipeline.json"}


def test_no_lock_is_left_in_a_finished_run(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "own").mkdir()
    home = own_home(write_files(tmp_path / "files"), tmp_path / "own")
    train_ppo(home.config(max_steps=1))
    assert not list(home.path.rglob(locks.LOCK))


def test_best_of_n_has_its_file_for_itself(tmp_path, other, capsys):
    """Another file of the same folder is another one's."""
    out = tmp_path / "best.jsonl"
    process = other(out, "file")
    locks.hold(tmp_path / "else.jsonl", is_file=True)
    locks.release(tmp_path / "else.jsonl", is_file=True)
    flags = ["--model_name_or_path", "demo", "--reward_model_path", "demo", "--dataset_name", "none.jsonl"]
    with pytest.raises(SystemExit):
        evaluate.main([*flags, "--output_file", str(out)])
    assert f"output_file: {out} is being written by process {process.pid} of " in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^output_dir: .*/file/run cannot be written \(Not a directory\)$"):
        locks.hold(tmp_path / "file" / "run")
