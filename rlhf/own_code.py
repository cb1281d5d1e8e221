"""Functions and classes that an option names by file: `path/to/file.py:name`."""

import importlib.util
import sys
from pathlib import Path


def load_named(option: str, name: str, known=(), modules: dict | None = None):
    """The object `f` of a file, by `path/to/file.py:f`.

    Args:
        option: the option that holds the name, for messages.
        name: what it holds.
        known: what it may hold besides, for messages.
        modules: files that have run, so that each runs once; filled in. None = no other name follows.
    Raises:
        ValueError: no such file, or no such function or class in it; or the file does not run.
    """
    path, _, attribute = name.rpartition(":")
    file, modules = Path(path).expanduser(), {} if modules is None else modules
    if not attribute.isidentifier() or file.suffix != ".py":
        raise ValueError(f"{option}: got {name!r}, want {', '.join(known)}{' or ' * bool(known)}path/to/file.py:name")
    if not file.is_file():
        raise ValueError(f"{option}: got {name!r}, but there is no file {path}")
    if file not in modules:
        modules[file] = _run_file(option, file)
    found = getattr(modules[file], attribute, None)
    if not callable(found):
        raise ValueError(f"{option}: got {name!r}, but {path} defines no function or class {attribute!r}")
    return found


def _run_file(option: str, file: Path):
    spec = importlib.util.spec_from_file_location(f"rlhf_{option}_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{option}: {file} does not run ({type(error).__name__}: {error})") from error
    return module
