"""Confined processes that stay and answer questions, for checks whose imports take longer than they do.

They are locked in as those of `rlhf/rewards/sandbox.py` are, but that CPU time is limited for each question. The kernel
keeps that limit, so nothing that is computed holds up a run, in whichever thread it asks. They end with the process
that started them; one that broke down is replaced.
"""

import atexit
import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from ..data.parallel import processes
from .sandbox import CHILD, SandboxError

MOST = 4
"""Processes at a time, at most."""
AT_LEAST = 8
"""So many questions are worth a further process, which takes half a second to start."""
PATIENCE_S = 60.0
"""By the clock a question may take this and ten times its limit of CPU time, on a machine under load."""


class Workers:
    """Processes that answer questions of one kind, started when they are needed.

    Args:
        kind: "math", of `rlhf/rewards/sandbox_child.py`.
        row_time_limit_s: > 0, seconds of CPU time for a question.
        memory_limit_mb: > 0, MiB of address space of a process.
    """

    def __init__(self, kind, *, row_time_limit_s=5.0, memory_limit_mb=1024):
        self.options = kind, row_time_limit_s, memory_limit_mb
        self._forget()
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)  # the processes are its parent's

    def _forget(self):
        self.workers, self.lock = [], threading.Lock()

    def close(self):
        """End the processes."""
        for worker in self.workers:
            worker.end()

    def ask(self, questions):
        """The answers to a list of questions, in its order; None where time or memory were up.

        Raises:
            SandboxError: this machine cannot confine a process, or it does not start.
        """
        questions = list(questions)
        with self.lock:
            size = min(MOST, processes(), 1 + len(questions) // AT_LEAST)
            self.workers += [Worker(*self.options) for _ in range(size - len(self.workers))]
            if size == 1:
                return [self.workers[0].ask(question) for question in questions]
            answers, waiting = [None] * len(questions), iter(enumerate(questions))
            turn = threading.Lock()

            def work(worker):
                while True:
                    with turn:
                        number, question = next(waiting, (None, None))
                    if number is None:
                        return
                    answers[number] = worker.ask(question)

            with ThreadPoolExecutor(size) as pool:
                list(pool.map(work, self.workers[:size]))
            return answers


class Worker:
    """One process and the pipes to it. The first line that it writes says that it is ready, each other is an answer."""

    def __init__(self, kind, row_s, memory_limit_mb):
        self.kind, self.row_s, self.memory_limit_mb = kind, row_s, memory_limit_mb
        self.process = None

    def ask(self, question):
        """The answer; None where time or memory were up, or the process broke down twice over it."""
        for _ in range(2):
            if self.process is None:
                self._start()
            with contextlib.suppress(BrokenPipeError):  # then it has ended, and there is no line
                self.process.stdin.write(json.dumps(question).encode() + b"\n")
            line = self._line()
            if line:
                return json.loads(line)
            if self.end() == -signal.SIGPROF:
                return None
        return None

    def _start(self):
        """Start the process, and wait until it is ready.

        Raises:
            SandboxError: it does not start; says why.
        """
        proof = secrets.token_hex(16)
        task = {
            "kind": self.kind, "serves": True, "proof": proof, "directory": None, "cpu_s": None, "row_s": self.row_s,
            "path": [str(entry) for entry in sys.path if entry], "file_bytes": 1 << 20,
            "memory_bytes": int(self.memory_limit_mb * 2**20),
        }  # fmt: skip
        with tempfile.TemporaryFile() as messages:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-B", str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=messages, cwd="/", start_new_session=True, bufsize=0,
                env={"HOME": "/", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            line = self._line().decode(errors="replace")
            if line == "null\n":
                return
            self.end()
            if line.startswith(f"{proof} "):
                reason = line.partition(" ")[2]
                raise SandboxError(f"this machine cannot confine a process, so no code is run: {reason}")
            messages.seek(0)
            said = messages.read(1 << 20).decode(errors="replace").strip()[-500:]
        raise SandboxError(f"the process that checks rows by {self.kind} does not start: {said or 'no message'}")

    def _line(self):
        """What it writes next, to the end of the line; less where it ends, or takes too long."""
        found, deadline = b"", time.monotonic() + PATIENCE_S + 10 * self.row_s
        output = select.poll()
        output.register(self.process.stdout, select.POLLIN)
        while not found.endswith(b"\n"):
            if not output.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
                return b""
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                return found
            found += piece
        return found

    def end(self):
        """End the process, and return its exit status."""
        if self.process is None:
            return None
        process, self.process = self.process, None
        for pipe in (process.stdin, process.stdout):
            pipe.close()
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
