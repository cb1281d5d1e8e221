"""One run at a time in a folder: a lock that a run holds while it lives and that ends with its process, also by a kill.

The lock is the kernel's (flock) on a small file in the folder: nothing has to be cleaned up by hand. It is the
process's: what it does there one after the other is not its own rival, and processes that it forks hold nothing.
"""

import atexit
import contextlib
import errno
import fcntl
import logging
import os
import platform
from pathlib import Path

logger = logging.getLogger("rlhf")
LOCK = ".rlhf.lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
_held = {}


def hold(directory: str | Path, *, option: str = "output_dir", name: str = LOCK) -> None:
    """Take the lock of a folder, which is made, for this process; it may hold it already.

    Args:
        option: what named the folder, for the message.
        name: the lock's file in it; other names are other locks.
    Raises:
        ValueError: another process holds it.
    """
    path = Path(os.path.realpath(directory)) / name
    if path in _held:
        if _is(_held[path], path):
            return
        _held.pop(path).close()  # the folder was removed meanwhile
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it stays open while the lock is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"{option}: {directory} is being written by {holder}; wait for it, or give another place"
            ) from None
        except OSError as error:
            file.close()
            if error.errno not in WITHOUT_LOCKS:
                raise
            logger.warning("%s: %s is on a file system without locks; start one run at a time in it", option, directory)
            return
        if _is(file, path):
            break
        file.close()  # its holder removed it between our two calls
    file.truncate(0)
    file.write(f"process {os.getpid()} of {platform.node()}\n")
    file.flush()
    _held[path] = file


def _is(file, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def release(directory: str | Path, *, name: str = LOCK) -> None:
    """Give the lock back, if this process holds it."""
    path = Path(os.path.realpath(directory)) / name
    file = _held.pop(path, None)
    if file is not None:
        with contextlib.suppress(OSError):
            if _is(file, path):
                path.unlink()
        file.close()


@contextlib.contextmanager
def released(directory: str | Path, *, name: str = LOCK):
    """Give the lock of a folder back at the end of a block, however it ends."""
    try:
        yield
    finally:
        release(directory, name=name)


def _forget() -> None:
    for file in _held.values():
        file.close()
    _held.clear()


@atexit.register
def _release_all() -> None:
    for path in list(_held):
        release(path.parent, name=path.name)


os.register_at_fork(after_in_child=_forget)
