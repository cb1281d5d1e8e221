"""Whether what the trainers need is installed: `pip install rlhf-kernels` alone brings what the losses need."""

import importlib.metadata
import re

DISTRIBUTION = "rlhf-kernels"
REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:>=\s*([\d.]+))?.*; *extra *== *['\"]train['\"]")


def lacking() -> str | None:
    """What the extra `train` asks for and is not there, with what to do about it; None where all of it is.

    Nothing is known, so nothing is lacking, where the package itself is not installed, but read from its sources.
    """
    try:
        wanted = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    missing = []
    for name, floor in (match.groups() for match in map(REQUIREMENT.match, wanted) if match):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if floor and _numbers(found) < _numbers(floor):
            missing.append(f"{name} >= {floor} (there is {found})")
    return f"needs {', '.join(missing)}: pip install '{DISTRIBUTION}[train]'" if missing else None


def _numbers(text: str) -> list[int]:
    """The leading numbers of a version, of which a missing one counts as 0."""
    found = [int(number) for number in re.match(r"[\d.]*", text)[0].split(".") if number]
    return found + [0] * (4 - len(found))
