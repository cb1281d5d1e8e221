"""Files written so that a full disk, a quota or a kill leaves the old content or the new, and is told in one line."""

import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

TEMPORARY_NAME = re.compile(r"\..+\.tmp-\d+(-old)?")
LONGEST_NAME = 255  # bytes, on all usual file systems
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust (safetensors, tokenizers) writes an errno
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|iostream error|file write failed|inline_container")


class WriteError(OSError):
    """Something that could not be written: `str` of it is one line with the path and the cause."""

    def __str__(self):
        return f"{self.filename}: cannot be written ({self.strerror})"


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what Python, safetensors, tokenizers and torch raise where a file cannot be written into a WriteError.

    Args:
        path: what is being written, as the user knows it; not the temporary name that it has meanwhile.
    Raises:
        WriteError: names `path` and the cause. Other errors go through as they are.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        cause = _cause(error)
        if cause is None:
            raise
        raise WriteError(*cause, str(path)) from error


def _cause(error: BaseException) -> tuple[int, str] | None:
    """(errno, text) of the operating system's error behind an exception; None where there is none."""
    if isinstance(error, OSError):
        return (error.errno, error.strerror) if error.errno else None
    rust = _OS_ERROR.search(str(error))
    if rust:
        return int(rust[1]), os.strerror(int(rust[1]))
    chained = error.__cause__ or error.__context__
    found = _cause(chained) if chained is not None else None
    if found is None and isinstance(error, RuntimeError) and _TORCH_WRITER.search(str(error)):
        return errno.EIO, "writing stopped half-way; is the disk full?"  # torch keeps the reason to itself
    return found


def fsync(path: str | Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(name: str) -> str:
    """The name under which `name` is written by this process; `TEMPORARY_NAME` matches it."""
    end = f".tmp-{os.getpid()}"
    room = LONGEST_NAME - len(f".{end}-old")
    return f".{os.fsdecode(os.fsencode(name)[:room])}{end}"


def write_all(file, content: bytes) -> None:
    """Write all of `content` to an unbuffered file; one `write` may take less, as where the disk fills up."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file through a temporary one, so that a reader sees the old or the new content.

    Raises:
        WriteError: names the path and the cause; the old content is still there.
    """
    write_parts(path, [content])


def write_parts(path: str | Path, parts: Iterable[bytes]) -> None:
    """`write_bytes` of content that is made piece by piece."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(temporary_name(path.name))
    with writing(path):
        try:
            with open(temporary, "wb", buffering=0) as file:
                for part in parts:
                    write_all(file, part)
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def append_bytes(path: str | Path, content: bytes) -> None:
    """Append to a file; where that fails, the file is as it was before.

    Raises:
        WriteError: names the path and the cause.
    """
    with writing(path), open(path, "ab", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        try:
            write_all(file, content)
        except OSError:
            file.truncate(end)
            raise


def json_bytes(value, *, indent: int | None = None) -> bytes:
    """`value` as one line (or with `indent`) of JSON and a line break, in UTF-8.

    Numbers that are not finite become null: JSON has no NaN. Text that is not Unicode (half a surrogate pair, as in the
    name of a file that is not UTF-8) is escaped.
    """
    value = _finite(value)
    try:
        return (json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode()


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_object(path: str | Path) -> dict:
    """The JSON object that a file holds.

    Raises:
        ValueError: it holds something else; names the file.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, wants a JSON object")
    return found


def lines_of(path: str | Path) -> list[str]:
    """The lines of a UTF-8 file, ends kept; a last one may be torn, and has none.

    Lines end at a line feed and nowhere else: `str.splitlines` would end them at U+2028 too.
    """
    return re.findall(r"[^\n]*\n|[^\n]+", Path(path).read_bytes().decode("utf-8", errors="replace"))


def prepare_output_file(path: str | Path, name: str = "output_file") -> Path:
    """Make the folder of a file that will be written later, and try whether it can be; an old file stays until then.

    Args:
        name: the flag that gave the path, for messages.
    Raises:
        ValueError: `path` is a directory, or cannot be written.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{name}: {path} is a directory; give a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = path.with_name(temporary_name(path.name))
        trial.touch()
        trial.unlink()
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be written ({error.strerror})") from None
    return path
