"""Replaces functions and classes of another package for a while, and puts back what was there."""

import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

_MISSING = object()


def check_version(package: str, tested: tuple[str, ...]) -> None:
    """Raise unless `package` is installed in one of the versions that this drop-in was tested with."""
    wanted = ", ".join(tested)
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"{package} is not installed; the drop-in was tested with {package} {wanted}") from None
    if found not in tested:
        raise RuntimeError(f"{package} is {found}, expected a version that the drop-in was tested with: {wanted}")


class Patches:
    """What a drop-in replaces, in a module or class and wherever else its package holds the same object.

    enable() and disable() nest: what was there comes back with the last disable(), also in modules of the package that
    were imported in between and took the replacement. Neither goes on where somebody else has replaced an attribute in
    between: what they hold may call ours.

    Args:
        package: the package's name as it is imported, which is also that of its distribution.
        tested: versions that are accepted.
        replacements: called by the first enable(); gives (module or class, attribute, replacement).
    """

    def __init__(
        self, package: str, tested: tuple[str, ...], replacements: Callable[[], Iterable[tuple[object, str, object]]]
    ):
        self.package, self.tested, self._replacements = package, tested, replacements
        self._depth = 0
        self._places: list[tuple[object, str, object, object]] = []  # (holder, attribute, original, replacement)
        self._lock = threading.RLock()

    @property
    def enabled(self) -> bool:
        return self._depth > 0

    def enable(self) -> None:
        """Replace, or raise and leave everything as it was."""
        with self._lock:
            if self._depth:
                self._check_ours()
            else:
                check_version(self.package, self.tested)
                self._places = list(self._found(self._replacements()))
                for holder, name, _, new in self._places:
                    setattr(holder, name, new)
            self._depth += 1

    def disable(self) -> None:
        """Take back one enable(); without one, nothing."""
        with self._lock:
            if not self._depth:
                return
            self._check_ours()
            self._depth -= 1
            if self._depth:
                return
            for holder, name, old, _ in self._places:
                setattr(holder, name, old)
            for old, new in {id(new): (old, new) for _, _, old, new in self._places}.values():
                for module, name in self._holding(new):
                    setattr(module, name, old)
            self._places = []

    @contextmanager
    def patched(self):
        """Replaced inside a `with`."""
        self.enable()
        try:
            yield
        finally:
            self.disable()

    def _found(self, replacements):
        seen = set()
        for holder, name, new in replacements:
            old = vars(holder).get(name, _MISSING)
            if old is _MISSING:
                raise AttributeError(f"{_called(holder)} has no {name!r}, which the drop-in replaces")
            others = self._holding(old) if isinstance(holder, ModuleType) else []
            for place, key in [(holder, name), *others]:
                if (id(place), key) not in seen:
                    seen.add((id(place), key))
                    yield place, key, old, new

    def _holding(self, value):
        """(module, name) wherever a loaded module of the package holds `value`."""
        return [
            (module, key)
            for path, module in list(sys.modules.items())
            if isinstance(module, ModuleType) and (path == self.package or path.startswith(f"{self.package}."))
            for key, held in list(vars(module).items())
            if held is value
        ]

    def _check_ours(self):
        for holder, name, _, new in self._places:
            if vars(holder).get(name) is not new:
                raise RuntimeError(
                    f"{_called(holder)}.{name} was replaced by somebody else while the drop-in was enabled; undo that "
                    "first"
                )


def _called(holder):
    return getattr(holder, "__qualname__", None) or getattr(holder, "__name__", repr(holder))
