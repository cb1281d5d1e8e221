"""Which backend the `with backend(name)` blocks of threads and asyncio tasks choose."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_UNSAID = object()
_own = contextvars.ContextVar("backend", default=_UNSAID)  # the choice of this thread or task; None: automatic


class _Block:
    def __init__(self, name: str):
        self.name = name


_open: list[_Block] = []  # the blocks that any thread is in, the latest last


def chosen() -> str | None:
    """The backend of this thread's innermost block; if it is in none, of the latest block of all."""
    own = _own.get()
    if own is not _UNSAID:
        return own
    latest = _open[-1:]  # in one step: other threads may change the list
    return latest[0].name if latest else None


class resumed:
    """This thread chooses again what `chosen` gave, in whatever thread that was."""

    def __init__(self, name: str | None):
        self.name = name

    def __enter__(self):
        self.before = _own.get()
        _own.set(self.name)

    def __exit__(self, *_):
        _own.set(self.before)


@contextlib.contextmanager
def block(name: str) -> Iterator[None]:
    """This thread chooses the backend, and so do threads that are in no block."""
    entry = _Block(name)
    _open.append(entry)
    try:
        with resumed(name):
            yield
    finally:
        _open.remove(entry)
