"""Runs a command that starts processes of its own, and leaves none behind."""

import contextlib
import os
import signal
import subprocess

TIMEOUT = 900  # seconds, for a machine that is busy with much else


def run(command, **options) -> subprocess.CompletedProcess:
    """`subprocess.run` with its output as text; what the command has started ends with it, also where it hangs."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **pipes, **options) as process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # launchers hand it on to workers in sessions of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):  # as it should be: nobody is left
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
