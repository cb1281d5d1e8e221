"""Replaces functions and classes of another package for a while, and puts back what was there."""

import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

_MISSING = object()
Place = tuple[object, str, object]  # (module or class, attribute, replacement)


def check_version(package: str, tested: tuple[str, ...]) -> None:
    """Raise unless `package` is installed in one of the versions that this drop-in was tested with."""
    wanted = ", ".join(tested)
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"{package} is not installed; the drop-in was tested with {package} {wanted}") from None
    if found not in tested:
        raise RuntimeError(f"{package} is {found}, expected a version that the drop-in was tested with: {wanted}")


def check_signatures(holder: ModuleType | type, wanted: Mapping[str, tuple[str, ...]]) -> None:
    """Raise unless a module's or class's functions take the arguments {name: names}; of a class, its `forward`."""
    for name, arguments in wanted.items():
        function = getattr(holder, name, None)
        if function is None:
            raise RuntimeError(f"{_called(holder)} has no {name}, which the drop-in serves")
        found = tuple(inspect.signature(getattr(function, "forward", function)).parameters)
        if found != arguments:
            raise RuntimeError(f"{_called(holder)}.{name} takes {', '.join(found)}, expected {', '.join(arguments)}")


class Patches:
    """What a drop-in replaces, in a module or class and wherever else its package holds the same object.

    enable() and disable() nest: what was there comes back with the last disable(), also in modules of the package that
    were imported in between and took the replacement. Neither goes on where somebody else has replaced an attribute in
    between: what they hold may call ours.

    Args:
        package: the package's name as it is imported, which is also that of its distribution.
        tested: versions that are accepted.
        replacements: called by the first enable(); gives (module or class, attribute, replacement), and a fourth entry,
            False, for what is replaced there alone.
        on_import: {module: {"function" or "Class.method": replacement}}. Nothing is imported for these: they are
            replaced at once in modules that are loaded, and in the others as soon as they are.
    """

    def __init__(
        self,
        package: str,
        tested: tuple[str, ...],
        replacements: Callable[[], Iterable[Place]] = tuple,
        *,
        on_import: Mapping[str, Mapping[str, object]] | None = None,
    ):
        self.package, self.tested, self._replacements = package, tested, replacements
        self.on_import = dict(on_import or {})
        self._finder = _Finder(self.on_import, self._imported)
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
                loaded = [
                    place
                    for name, attributes in self.on_import.items()
                    if name in sys.modules
                    for place in places_in(sys.modules[name], attributes)
                ]
                self._replace([*self._replacements(), *loaded])
                if self.on_import:
                    sys.meta_path.insert(0, self._finder)
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
            if self._finder in sys.meta_path:
                sys.meta_path.remove(self._finder)
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

    def _imported(self, module):
        with self._lock:
            if self._depth:
                self._replace(places_in(module, self.on_import[module.__name__]))

    def _replace(self, replacements):
        found = list(self._found(replacements))
        for holder, name, _, new in found:
            setattr(holder, name, new)
        self._places += found

    def _found(self, replacements):
        seen = set()
        for holder, name, new, *everywhere in replacements:
            old = vars(holder).get(name, _MISSING)
            if old is _MISSING:
                raise AttributeError(f"{_called(holder)} has no {name!r}, which the drop-in replaces")
            spread = isinstance(holder, ModuleType) and all(everywhere)
            others = self._holding(old) if spread else []
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


def places_in(module: ModuleType, attributes: Mapping[str, object]) -> list[Place]:
    """{"function" or "Class.method": replacement} of a module as (module or class, attribute, replacement)."""
    found = []
    for path, new in attributes.items():
        *owners, name = path.split(".")
        holder = module
        for owner in owners:
            if owner not in vars(holder):
                raise AttributeError(f"{_called(holder)} has no {owner!r}, in which the drop-in replaces {name!r}")
            holder = vars(holder)[owner]
        found.append((holder, name, new))
    return found


def call_on_import(name: str, imported: Callable[[ModuleType], None]) -> None:
    """Call `imported` with a module, which is not loaded yet, as soon as it is."""
    sys.meta_path.insert(0, _Finder((name,), imported))


class _Finder(MetaPathFinder):
    """Calls `imported` with each module of `names` as soon as it has been executed."""

    def __init__(self, names, imported):
        self._names, self._imported = names, imported

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self._names:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self._imported)
                return spec
        return None


class _Loader:
    """A module's own loader, and a call after it."""

    def __init__(self, loader, imported):
        self._loader, self._imported = loader, imported

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._imported(module)


def _called(holder):
    return getattr(holder, "__qualname__", None) or getattr(holder, "__name__", repr(holder))
