"""What takes long to make is kept on disk: entries of the cache directory, each a folder that is whole or absent.

The directory is $RLHF_CACHE, else $XDG_CACHE_HOME/rlhf, else ~/.cache/rlhf; RLHF_CACHE=off keeps nothing beyond the
process. An entry's name is made from all that its content depends on, so it never has to be brought up to date. Entries
that nobody has opened for 30 days go when a new one is written.
"""

import atexit
import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

from ..disk import WriteError, fsync, json_bytes, writing

logger = logging.getLogger("rlhf")
VARIABLE = "RLHF_CACHE"
OFF = ("0", "off", "no", "false", "none")
KEPT_DAYS, UNFINISHED_DAYS = 30, 1
CONTENT = "content.json"
ENTRY = re.compile(r"[a-z]+-[0-9a-f]{32}")
UNFINISHED = re.compile(r"\.[a-z]+-[0-9a-f]{32}\.tmp-\w+")
DAY = 24 * 60 * 60


def home() -> Path | None:
    """The cache directory, which may not be there yet; None: nothing is kept."""
    given = os.environ.get(VARIABLE, "")
    if given:
        return None if given.lower() in OFF else Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "rlhf"
    with contextlib.suppress(RuntimeError):  # a user without a home
        return Path.home() / ".cache" / "rlhf"
    return None


@cache
def made_by() -> list:
    """The versions that an entry depends on, and the code of this package, as a JSON value."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    versions = [platform.python_version()]
    for package in ("transformers", "tokenizers", "jinja2"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return [code.hexdigest(), *versions]


def name_of(value) -> str:
    """32 hexadecimal digits that name a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def entry(kind: str, key, make) -> tuple[Path, dict]:
    """The folder of an entry and what `make` said of it; made now, unless it is there.

    Where the cache directory cannot be written, that is told, and the entry lies in a temporary directory that ends
    with the process. Processes that make the same entry at the same time do not disturb each other.

    Args:
        kind: lower-case letters, the first part of the entry's name.
        key: JSON value, all that the content depends on.
        make: writes files into the folder that it gets, and returns a JSON object. Where it cannot write, it raises
            WriteError.
    Raises:
        WriteError: the temporary directory cannot be written either.
    """
    name, base = f"{kind}-{name_of(key)}", home()
    if base is not None:
        found = _whole(base / name)
        if found is not None:
            return base / name, found
        try:
            return _made(base, name, make)
        except WriteError as error:
            _tell_once(str(error))
    base = temporary()
    found = _whole(base / name)
    return _made(base, name, make) if found is None else (base / name, found)


@cache
def _tell_once(error: str) -> None:
    logger.warning("%s; a temporary directory is used, %s names another cache directory", error, VARIABLE)


@cache
def temporary() -> Path:
    """A directory that is removed when this process ends."""
    with writing(tempfile.gettempdir()):
        path = Path(tempfile.mkdtemp(prefix="rlhf-"))
    atexit.register(_remove_own, path, os.getpid())
    return path


def _remove_own(path, process):
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)


def _whole(folder: Path) -> dict | None:
    """What was said of an entry, if it is there and its files have the sizes that they were written with."""
    try:
        content = json.loads((folder / CONTENT).read_bytes())
        if any((folder / name).stat().st_size != size for name, size in content["files"].items()):
            return None
        said = content["said"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    with contextlib.suppress(OSError):
        os.utime(folder / CONTENT)  # it is in use
    return said


def _made(base: Path, name: str, make) -> tuple[Path, dict]:
    with writing(base):
        base.mkdir(parents=True, exist_ok=True)
        _remove_unused(base)
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.tmp-", dir=base))
    try:
        said = make(folder)
        with writing(base / name):
            files = {path.name: path.stat().st_size for path in folder.iterdir()}
            (folder / CONTENT).write_bytes(json_bytes({"files": files, "said": said}))
            for path in folder.iterdir():
                fsync(path)
            _put_in_place(folder, base / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return base / name, said


def _put_in_place(folder: Path, target: Path) -> None:
    while True:
        try:
            os.rename(folder, target)
            return
        except OSError:
            if not target.exists():
                raise
        if _whole(target) is not None:  # another process was faster
            return
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, aside / "damaged")
        shutil.rmtree(aside, ignore_errors=True)


def _remove_unused(base: Path) -> None:
    now = time.time()
    for path in base.iterdir():
        with contextlib.suppress(OSError):
            if ENTRY.fullmatch(path.name):
                file = path / CONTENT
                old = now - (file if file.exists() else path).stat().st_mtime > KEPT_DAYS * DAY
            else:
                old = UNFINISHED.fullmatch(path.name) and now - path.stat().st_mtime > UNFINISHED_DAYS * DAY
            if old:
                shutil.rmtree(path, ignore_errors=True)
