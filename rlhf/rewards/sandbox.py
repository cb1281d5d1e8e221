"""Code that nobody has read, run in a process of its own that can do little harm.

The process starts with an environment of its own, an empty temporary directory that is removed afterwards, and no
stdin. Before the code runs, the process gives up for good (`rlhf/rewards/sandbox_child.py`):

- CPU time, memory (address space), file size and open files beyond its limits; more wall-clock time ends it;
- sockets of every kind, so the network, and io_uring: by a seccomp filter, which needs no rights;
- starting, signalling and reading other processes (threads are allowed), changing owners and modes of files;
- writing outside its directory: by Landlock, Linux 5.13 or later, where it is switched on;
- the capabilities of root.

What does not hold: it may read whatever the user may read, and fill the disk with files of at most FILE_BYTES each for
as long as it runs. The code shares its interpreter with the test that follows
it, so code that means to can fake a pass; leaving early (`sys.exit`, `os._exit`) does not pass. A kernel's bugs are not
kept out. Where seccomp cannot be had, nothing is run. Linux on x86-64 or arm64 only; of the two, arm64 is untested.
"""

import contextlib
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from ..errors import RunError

CHILD = Path(__file__).parent / "sandbox_child.py"
FILE_BYTES = 16 << 20
"""Largest file that the process may write; its results are a file too."""


class SandboxError(RunError):
    """The process could not be confined, so nothing was run; or it broke down, which no input should do."""


class Outcome(NamedTuple):
    passed: bool
    reason: str


def run_python(*sources, time_limit_s=5.0, memory_limit_mb=512):
    """Run Python sources one after the other in one namespace, as `__main__`, and tell whether the last one ended.

    Args:
        sources: text of the programs.
        time_limit_s: > 0, seconds of wall-clock time, the start of the interpreter (some 0.05 s) included.
        memory_limit_mb: > 0, MiB of address space; the interpreter takes some 30 of them.
    Returns:
        Outcome(passed, reason): passed only if no exception, SystemExit among them, left any of the sources and the
        process reached the end of the last one. The reason is for people: it says what stopped it.
    Raises:
        ValueError: a limit is not positive.
        SandboxError: this machine cannot confine a process.
    Example:
        >>> run_python("def double(x): return 2 * x", "assert double(2) == 4").passed
        True
        >>> run_python("import sys; sys.exit(0)", "assert False").reason
        'SystemExit: 0 (part 1, line 1)'
    """
    parts = [(f"<part {number}>", source) for number, source in enumerate(sources, start=1)]
    task = {"kind": "python", "parts": parts}
    status, output, _ = _run(task, time_limit_s, memory_limit_mb)
    if output == task["proof"]:
        return Outcome(True, "passed")
    if status is None:
        return Outcome(False, f"time limit of {time_limit_s:g} s")
    if output:
        return Outcome(False, output[:1000])
    cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return Outcome(False, f"the process ended early ({cause})")


def run_checks(kind, rows, *, row_time_limit_s=1.0, memory_limit_mb=1024):
    """Check texts by a "regex" or a "json_schema", in one process, each with its own time limit.

    Args:
        kind: "regex" (rows are (text, pattern)) or "json_schema" (rows are (text, schema)).
        row_time_limit_s: > 0, seconds of wall-clock time for a row.
        memory_limit_mb: > 0, MiB of address space of the process.
    Returns:
        A list: True, False, None for a row whose time was up, or a string that says what is wrong with its pattern or
        schema.
    Raises:
        ValueError: a limit is not positive.
        SandboxError: this machine cannot confine a process, or the process broke down.
    Example:
        >>> rows = [("a cat", "c.t"), ("a dog", "c.t"), ("a" * 40, "(a+)+b"), ("", "[")]
        >>> run_checks("regex", rows, row_time_limit_s=0.1)
        [True, False, None, "'[' is not a regular expression (unterminated character set at position 0)"]
    """
    if not rows:
        return []
    task = {"kind": kind, "rows": rows, "row_s": row_time_limit_s}
    if not row_time_limit_s > 0:
        raise ValueError(f"row_time_limit_s: got {row_time_limit_s}, want a number > 0")
    status, output, errors = _run(task, 30 + len(rows) * row_time_limit_s, memory_limit_mb)
    if status != 0 or not output:
        what = "took too long" if status is None else f"ended with status {status}"
        raise SandboxError(f"the process that checks rows by {kind} {what}: {errors[-500:] or 'it left no message'}")
    return json.loads(output)


def _run(task, time_limit_s, memory_limit_mb):
    """Start the process and wait. -> (exit status, None if it was killed at its time limit; result; messages)."""
    for name, value in (("time_limit_s", time_limit_s), ("memory_limit_mb", memory_limit_mb)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: got {value}, want a number > 0")
    with (
        _empty_directory() as directory,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as result,
        tempfile.TemporaryFile() as messages,
    ):
        task |= {
            "proof": secrets.token_hex(16),  # what the process must know to be believed
            "directory": directory, "path": [str(entry) for entry in sys.path if entry], "file_bytes": FILE_BYTES,
            "cpu_s": math.ceil(time_limit_s) + 1, "memory_bytes": int(memory_limit_mb * 2**20),
        }  # fmt: skip
        given.write(json.dumps(task).encode())
        given.seek(0)
        environment = {"HOME": directory, "TMPDIR": directory, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-B", str(CHILD)], stdin=given, stdout=result, stderr=messages,
            cwd=directory, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _kill_group(process)
        output, errors = (_read(file) for file in (result, messages))
    if output.startswith(f"{task['proof']} "):
        reason = output.partition(" ")[2]
        raise SandboxError(f"this machine cannot confine a process, so no code is run: {reason}")
    return status, output, errors


@contextlib.contextmanager
def _empty_directory():
    """A temporary directory, removed at the end whatever was made in it."""
    directory = tempfile.mkdtemp(prefix="rlhf-sandbox-")
    try:
        yield directory
    finally:
        try:
            shutil.rmtree(directory)
        except (OSError, RecursionError):  # without permission, or deeper than rmtree can go
            for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
                subprocess.run([*command, directory], check=False, stderr=subprocess.DEVNULL)


def _kill_group(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(file):
    file.seek(0)
    return file.read(FILE_BYTES).decode(errors="replace")
