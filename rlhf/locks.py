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


def hold(place: str | Path, *, is_file: bool = False, option: str = "output_dir") -> None:
    """Take the lock of a folder, which is made, for this process; it may hold it already.

    Args:
        is_file: the place is a file; other files of its folder have locks of their own.
        option: what named the place, for messages.
    Raises:
        ValueError: another process holds it, or it cannot be written.
    """
    path = _lock_of(place, is_file)
    if path in _held:
        if _is(_held[path], path):
            return
        _held.pop(path).close()  # the folder was removed meanwhile
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it stays open while the lock is held
        except OSError as error:
            raise ValueError(f"{option}: {place} cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"{option}: {place} is being written by {holder}; wait for it, or give another place"
            ) from None
        except OSError as error:
            file.close()
            if error.errno not in WITHOUT_LOCKS:
                raise
            logger.warning("%s: %s is on a file system without locks; start one run at a time in it", option, place)
            return
        if _is(file, path):
            break
        file.close()  # its holder removed it between our two calls
    file.truncate(0)
    file.write(f"process {os.getpid()} of {platform.node()}\n")
    file.flush()
    _held[path] = file


def _lock_of(place: str | Path, is_file: bool) -> Path:
    place = Path(os.path.realpath(place))
    return place.with_name(f".{place.name[:100]}.lock") if is_file else place / LOCK


def _is(file, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def release(place: str | Path, *, is_file: bool = False) -> None:
    """Give the lock back, if this process holds it."""
    _drop(_lock_of(place, is_file))


def _drop(path: Path) -> None:
    file = _held.pop(path, None)
    if file is not None:
        with contextlib.suppress(OSError):
            if _is(file, path):
                path.unlink()
        file.close()


@contextlib.contextmanager
def released(place: str | Path, *, is_file: bool = False):
    """Give the lock of a place back at the end of a block, however it ends."""
    try:
        yield
    finally:
        release(place, is_file=is_file)


def _forget() -> None:
    for file in _held.values():
        file.close()
    _held.clear()


@atexit.register
def _release_all() -> None:
    for path in list(_held):
        _drop(path)


os.register_at_fork(after_in_child=_forget)
