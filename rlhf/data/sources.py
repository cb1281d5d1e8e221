"""Which files a name means: a file, a pattern of names, or the part of a folder that holds a split."""

import glob
import json
import os
import re
from pathlib import Path

from .cards import described
from .chunks import DataError
from .readers import READERS
from .streams import COMPRESSED, ending
from .tables import TABLES

FORMATS = {**READERS, **TABLES}
_SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
_NOT_ROWS = re.compile(r"[._]|(readme|license|licence|citation|notice|changelog)\b|dataset_(infos?|dict)\.json", re.I)
_SHARD = re.compile(r"(?:(?:^|[-_. ])(?:part|shard|chunk|of|\d+|[0-9a-f]{16}))+$", re.I)
_OF = re.compile(r"(\d+)-of-(\d+)")
_SHOWN = 12


def files_of(name, split, config):
    """The files that a name, a split and a configuration mean, in order; None where nothing lies there.

    Raises:
        DataError: a folder or a pattern that does not hold it, or holds only some of its shards.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        try:
            return _in_folder(path, split, config)
        except OSError as error:
            raise DataError(f"{error.filename or name}: cannot be read ({error.strerror})") from None
    if glob.has_magic(str(name)):
        found = [Path(file) for file in glob.glob(str(path), recursive=True)]
        found = [file for file in found if file.is_file() and not _NOT_ROWS.match(file.name)]
        if not found:
            raise DataError(f"{name}: no file has a name like this")
        return sorted(found, key=_naturally)
    return None


def data_files(folder):
    """The files with rows that lie in a folder itself; plain text only where nothing else does."""
    entries = [entry for entry in folder.iterdir() if not _NOT_ROWS.match(entry.name) and entry.is_file()]
    found = [entry for entry in entries if ending(entry) in FORMATS]
    found = [file for file in found if ending(file) != ".txt"] or found
    return sorted(found, key=_naturally)


def _in_folder(folder, split, config):
    saved = _saved_to_disk(folder, split)
    if saved is not None:
        return saved
    found = described(folder, split, config)
    if isinstance(found, list):
        return _whole(_with_rows(folder, found))
    if found is not None:
        folder = found
    elif config is not None:
        places = [place for place in (folder / config, folder / "data" / config) if place.is_dir()]
        if not places:
            raise DataError(f"{folder}: has no configuration {config!r}, a folder of that name; {_content(folder)}")
        folder = places[0]
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    found = _of_split(places, split)
    if found:
        return _whole(found, split)
    within = [inner for place in places for inner in _folders(place) if inner not in places]
    within = [inner for inner in within if not _words(inner.name) & _SPLITS and _of_split([inner], split)]
    if len(within) > 1:
        names = ", ".join(inner.name for inner in within)
        raise DataError(
            f"{folder}: holds {split!r} of several configurations: choose one of {names} (dataset_config), or give a "
            "pattern of names"
        )
    if within:
        return _whole(_of_split(within, split), split)
    raise DataError(f"{folder}: holds no rows of the split {split!r}; {_content(folder)}")


def _with_rows(folder, found):
    """The files with rows among files and folders that a README names."""
    within = [file for place in found if place.is_dir() for file in data_files(place)]
    files = {file for file in found if file.is_file() and ending(file) in FORMATS}
    if not (files or within):
        raise DataError(f"{folder}: what its README.md names holds no rows in a format that is known")
    return sorted({*files, *within}, key=_naturally)


def _of_split(places, split):
    """The files of a split in the first of some folders that has it; where none of them names any split, all files."""
    found = next(filter(None, (_named(place, split) for place in places)), [])
    names = [_group(file) for place in places for file in data_files(place)]
    names += [inner.name for place in places for inner in _folders(place)]
    if found or any(_words(name) & _SPLITS for name in names):
        return found
    return next(filter(None, map(data_files, places)), [])


def _named(folder, split):
    """The files of `<split>` alone or in shards, or in a folder of that name."""
    files = data_files(folder)
    groups = {file: _group(file) for file in files}
    exact = [file for file in files if groups[file] == split]
    longer = {group for group in groups.values() if re.match(rf"{re.escape(split)}[-_. ]", group)}
    if exact:
        return exact
    if len(longer) > 1:
        names = ", ".join(sorted(longer))
        raise DataError(f"{folder}: holds several splits of names like {split!r}: choose one of {names}")
    if longer:
        return [file for file in files if groups[file] in longer]
    return data_files(folder / split) if (folder / split).is_dir() else []


def _words(name):
    return set(re.split(r"[-_. \d]", name.lower()))


def _group(file):
    """A file's name without ending and numbers: `train` of train-00000-of-00002-0123456789abcdef.parquet."""
    name = file.name
    for _ in range(1 + (file.suffix.lower() in COMPRESSED)):
        name = name.rpartition(".")[0]
    return _SHARD.sub("", name)


def _whole(files, split=None):
    """The files, if they are one set, each of its shards once. In the folder of a split they may have any names."""
    folder, kinds = files[0].parent, {ending(file) for file in files}
    names = {re.sub(r"\d+", "", _group(file)) for file in files} if split not in (None, folder.name) else ()
    if len(kinds) > 1 or len(names) > 1 or len({_unpacked(file) for file in files}) < len(files):
        raise DataError(
            f"{folder}: several files could be meant ({_listed(file.name for file in files)}): name one, or give a "
            "pattern of names"
        )
    sets = {}
    for file in files:
        match = _OF.search(file.name)
        if match:
            numbers = sets.setdefault((file.parent, file.name[: match.start()]), {})
            numbers.setdefault(int(match[2]), set()).add(int(match[1]))
    for (parent, start), found in sets.items():
        if len(found) > 1:
            counts = " and of ".join(map(str, sorted(found)))
            raise DataError(f"{parent}: holds {start}... of {counts} files, wants those of one writing")
        ((count, numbers),) = found.items()
        missing = set(range(1, count + 1) if count in numbers else range(count)) - numbers
        if missing:
            shown = _listed(map(str, sorted(missing)))
            raise DataError(f"{parent}: not all of the {count} files {start}... are here, missing are numbers {shown}")
    return files


def _unpacked(file):
    return file.parent / (file.stem if file.suffix.lower() in COMPRESSED else file.name)


def _folders(folder):
    return sorted(place for place in folder.iterdir() if place.is_dir() and not _NOT_ROWS.match(place.name))


def _saved_to_disk(folder, split):
    """The files of a folder that `save_to_disk` of the package `datasets` wrote, or None."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise DataError(f"{folder}: has no split {split!r}, its splits are {', '.join(splits)}")
        folder = folder / split
    elif not (folder / "state.json").is_file():
        return None
    files = [folder / entry["filename"] for entry in _json(folder / "state.json").get("_data_files", [])]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(f"{folder}: {', '.join(missing) or 'every file'} of the saved set is missing")
    return files


def _json(path):
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _content(folder):
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    return f"it holds {_listed(names)}" if names else "it is empty"


def _listed(names):
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else "")


def _naturally(path):
    return [[int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)] for name in path.parts]
