"""Files of a run: whole or absent, and logs that continue where the checkpoint stands."""

import errno
import json
import os
import random
import subprocess
import sys
import tempfile

import numpy
import pytest
import torch
from safetensors.torch import save_file

from rlhf import checkpoint, locks
from rlhf.checkpoint import MetricsLog, atomic_directory, last_checkpoint, prepare_output_dir


def make_checkpoint(home, step, complete=True):
    folder = home / f"checkpoint-{step}"
    folder.mkdir()
    if complete:
        (folder / "trainer_state.json").write_text("{}")
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != locks.LOCK)


def test_atomic_directory_appears_whole(tmp_path):
    with atomic_directory(tmp_path / "a" / "model") as folder:
        (folder / "config.json").write_text("new")
        assert not (tmp_path / "a" / "model").exists()
    assert names(tmp_path / "a") == ["model"] and (tmp_path / "a" / "model" / "config.json").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError("killed"), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), atomic_directory(tmp_path / "checkpoint-1") as folder:
        (folder / "trainer_state.json").write_text("{}")
        raise error
    assert names(tmp_path) == [] and last_checkpoint(tmp_path) is None


def test_a_full_disk_at_fsync_leaves_the_old_content(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), atomic_directory(tmp_path / "model") as folder:
        (folder / "config.json").write_text("new")
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "config.json").read_text() == "old"


@pytest.mark.parametrize("replace", [False, True])
def test_an_existing_directory(tmp_path, replace):
    (tmp_path / "run" / "value").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("kept")
    (tmp_path / "run" / "value" / "old").write_text("kept")
    with atomic_directory(tmp_path / "run", replace=replace) as folder:
        (folder / "value").mkdir()
        (folder / "value" / "new").write_text("")
        (folder / "config.json").write_text("new")
    assert names(tmp_path) == ["run"]
    others = [] if replace else ["metrics.jsonl"]
    assert names(tmp_path / "run") == ["config.json", *others, "value"]
    assert names(tmp_path / "run" / "value") == (["new"] if replace else ["new", "old"])


def other_file_system(tmp_path):
    """A new folder on another file system than tmp_path's."""
    for home in ("/dev/shm", "/run", "/var/tmp"):
        if os.path.isdir(home) and os.access(home, os.W_OK) and os.stat(home).st_dev != os.stat(tmp_path).st_dev:
            return tempfile.TemporaryDirectory(dir=home)
    pytest.skip("needs two file systems that can be written")


@pytest.mark.parametrize("replace", [False, True])
def test_a_link_to_another_file_system(tmp_path, replace):
    with other_file_system(tmp_path) as target:
        (tmp_path / "run").symlink_to(target)
        with atomic_directory(tmp_path / "run", replace=replace) as folder:
            (folder / "config.json").write_text("new")
        with atomic_directory(tmp_path / "run" / "checkpoint-1") as folder:
            (folder / "trainer_state.json").write_text("{}")
        assert sorted(os.listdir(target)) == ["checkpoint-1", "config.json"]
        assert (tmp_path / "run").is_symlink() and names(tmp_path) == ["run"]


def test_a_checkpoint_that_was_moved_and_linked_can_be_removed(tmp_path):
    (tmp_path / "run").mkdir()
    moved = make_checkpoint(tmp_path, 1)
    (tmp_path / "run" / "checkpoint-1").symlink_to(moved)
    make_checkpoint(tmp_path / "run", 2)
    checkpoint.remove_old_checkpoints(tmp_path / "run", 1)
    assert names(tmp_path / "run") == ["checkpoint-2"] and (moved / "trainer_state.json").exists()


def test_the_working_directory_itself(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with atomic_directory(".") as folder:
        (folder / "config.json").write_text("new")
    assert names(tmp_path) == ["here"] and names(tmp_path / "here") == ["config.json"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_name_as_long_as_names_can_be(tmp_path, exists):
    path = tmp_path / ("é" * 127)
    path.mkdir() if exists else None
    with atomic_directory(path) as folder:
        (folder / "config.json").write_text("new")
    assert names(tmp_path) == [path.name] and names(path) == ["config.json"]


def test_only_the_directory_itself_need_be_writable(tmp_path):
    """As where a container has a disk for the output and nothing else."""
    run = tmp_path / "run"
    run.mkdir()
    seen = []
    with atomic_directory(run) as folder:
        seen.append(folder.parent)
        (folder / "config.json").write_text("new")
    assert seen == [run] and names(run) == ["config.json"]


@pytest.mark.parametrize("exists", [False, True])
def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path, exists):
    home = tmp_path / "run" if exists else tmp_path
    home.mkdir(exist_ok=True)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for left in (f".run.tmp-{ended.pid}", f".run.tmp-{ended.pid}-old"):
        (home / left).mkdir()
        (home / left / "model.safetensors").touch()
    others = [f".run.tmp-{os.getppid()}", f".run-2.tmp-{ended.pid}"]  # still at it; of another target
    for other in others:
        (home / other).mkdir()
    with atomic_directory(tmp_path / "run") as folder:
        (folder / "config.json").write_text("new")
    assert set(names(home)) == {*others, "config.json" if exists else "run"}


def test_last_checkpoint_is_the_newest_complete_one(tmp_path):
    assert last_checkpoint(tmp_path / "absent") is None
    make_checkpoint(tmp_path, 9)
    newest = make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 11, complete=False)
    (tmp_path / ".checkpoint-12.tmp-1").mkdir()
    assert last_checkpoint(tmp_path) == newest
    checkpoint.remove_old_checkpoints(tmp_path, 1)
    assert not (tmp_path / "checkpoint-9").exists() and newest.exists()


def test_checkpoints_inside_an_iteration(tmp_path):
    """They come after their iteration's, only the newest of them is kept, and they do not count."""
    for step in ("9", "10", "9-2", "9-11", "10-0"):
        make_checkpoint(tmp_path, step)
    assert [path.name[11:] for path in checkpoint.checkpoints(tmp_path)] == ["9", "9-2", "9-11", "10", "10-0"]
    checkpoint.remove_old_checkpoints(tmp_path, None)
    assert len(names(tmp_path)) == 5
    checkpoint.remove_old_checkpoints(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-10-0", "checkpoint-9"]
    checkpoint.remove_old_checkpoints(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-10-0"]
    make_checkpoint(tmp_path, "11")
    checkpoint.remove_old_checkpoints(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-11"]


def test_a_kill_while_removing_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or killed(path))
        checkpoint.remove_old_checkpoints(tmp_path, 1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2"] and len(names(tmp_path)) == 2
    prepare_output_dir(tmp_path, resume=True)
    assert names(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("wanted", [None, False, "false", "no"])
def test_resolve_checkpoint_off(tmp_path, wanted):
    make_checkpoint(tmp_path, 3)
    assert checkpoint.resolve_checkpoint(tmp_path, wanted) is None


def test_resuming_where_there_is_no_checkpoint_yet(tmp_path, caplog, monkeypatch):
    """A job that is queued again may always say true; a finished run is not begun anew by it."""
    monkeypatch.setattr(checkpoint.logger, "propagate", True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert checkpoint.resolve_checkpoint(tmp_path, "true") is None
    prepare_output_dir(tmp_path, resume=True)
    assert f"there is no checkpoint in {tmp_path}: the run starts from the beginning" in caplog.text
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(
        ValueError, match=r"^resume_from_checkpoint: got true, but .* holds a finished run and no check"
    ):
        checkpoint.resolve_checkpoint(tmp_path, "true")
    make_checkpoint(tmp_path, 3)
    assert checkpoint.resolve_checkpoint(tmp_path, "true").name == "checkpoint-3"


def test_resolve_checkpoint(tmp_path):
    assert checkpoint.resolve_checkpoint(tmp_path, "true") is None
    folder = make_checkpoint(tmp_path, 3)
    assert checkpoint.resolve_checkpoint(tmp_path, True) == folder
    assert checkpoint.resolve_checkpoint(tmp_path, str(folder)) == folder
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*not a complete checkpoint"):
        checkpoint.resolve_checkpoint(tmp_path, str(make_checkpoint(tmp_path, 4, complete=False)))


@pytest.mark.parametrize("marker", ["metrics.jsonl", "run.json", "config.json", "checkpoint-5"])
def test_an_output_dir_with_another_run_is_refused(tmp_path, marker):
    (tmp_path / "notes.txt").write_text("mine")
    assert prepare_output_dir(tmp_path, resume=False) == tmp_path
    (tmp_path / marker).mkdir() if marker.startswith("checkpoint") else (tmp_path / marker).write_text("{}")
    with pytest.raises(ValueError, match=rf"output_dir: .*already holds a run \({marker}"):
        prepare_output_dir(tmp_path, resume=False)
    prepare_output_dir(tmp_path, resume=True)


def test_prepare_output_dir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a directory"):
        prepare_output_dir(tmp_path / "file", resume=False)
    run = prepare_output_dir(tmp_path / "new" / "run", resume=False)
    (run / ".checkpoint-3.tmp-77").mkdir()
    (run / ".checkpoint-3.tmp-77-old").mkdir()
    (run / ".run.json.tmp-77").write_text("half")
    (run / ".hidden").write_text("mine")
    prepare_output_dir(run, resume=True)
    assert names(run) == [".hidden"]


def test_metrics_log_continues_at_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.log(step, {"loss": step / 2, "count": torch.tensor(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "torn')
    log = MetricsLog(tmp_path, resume_step=2)
    log.log(3, {"loss": float("nan"), "x": float("inf")})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert log.last() == {"loss": None, "x": None} and MetricsLog(tmp_path / "absent").last() == {}
    assert [row["step"] for row in rows] == [1, 2, 3] and all("time" in row for row in rows)
    assert rows[1]["loss"] == 1.0 and rows[1]["count"] == 2 and rows[2]["loss"] is None and rows[2]["x"] is None


def test_rng_state_round_trip(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), numpy.random.randn(), torch.rand(2).tolist()

    random.seed(3), numpy.random.seed(3), torch.manual_seed(3)
    draw()
    torch.save(checkpoint.rng_state(), tmp_path / "rng.pth")
    expected = draw()
    draw()
    checkpoint.set_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert draw() == expected


def test_write_json_replaces_at_once(tmp_path):
    checkpoint.write_json(tmp_path / "run.json", {"stage": "ppo"})
    with pytest.raises(TypeError):
        checkpoint.write_json(tmp_path / "run.json", {"bad": object()})
    assert json.loads((tmp_path / "run.json").read_text()) == {"stage": "ppo"} and names(tmp_path) == ["run.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_others_may_read_what_the_umask_lets_them(tmp_path, umask, mode):
    """safetensors writes files that only their owner can read, whatever the umask."""
    before = os.umask(umask)
    try:
        with checkpoint.atomic_directory(tmp_path / "model") as folder:
            (folder / "value").mkdir()
            save_file({"x": torch.zeros(1)}, folder / "value" / "model.safetensors")
            (folder / "config.json").write_text("{}")
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert modes == [mode, mode]


def test_an_output_dir_that_is_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"^output_dir: .*run is a link to .*gone, which is not there"):
        checkpoint.prepare_output_dir(tmp_path / "run", resume=False)
