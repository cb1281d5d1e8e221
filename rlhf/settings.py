"""Settings by name: presets, and hints for a name that is not known."""

import difflib
from pathlib import Path

PRESETS = Path(__file__).parent / "presets"


class UsageError(ValueError):
    """The command line or a settings file asks for something that does not exist."""


def preset_file(name):
    """The file of a named preset."""
    names = preset_names()
    if name not in names:
        raise UsageError(f"there is no preset {name!r}{nearest(name, names)}")
    return PRESETS / f"{name}.yaml"


def preset_names():
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def nearest(name, known, dashes=""):
    """A closing hint: the names most like `name`, or all if they are few."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(dashes + other for other in close)}?"
    return f"; known are {', '.join(known)}" if len(known) <= 12 else "; see --help"
