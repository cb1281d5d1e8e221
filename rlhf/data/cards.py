"""What the README.md of a data set's folder says of its configurations and splits, as the hub reads it."""

from .chunks import DataError


def described(folder, split, config):
    """What the README's `configs` name for a configuration and a split: a list of files, or a folder to look in; None
    where it names nothing.

    Raises:
        DataError: it names others than these, or files that are not there.
    """
    configs = _configs(folder / "README.md")
    if not configs:
        return None
    names = [str(entry.get("config_name")) for entry in configs]
    if config is None:
        chosen = [entry for entry in configs if entry.get("default") is True] or [
            entry for entry in configs if len(configs) == 1 or entry.get("config_name") == "default"
        ]
    else:
        chosen = [entry for entry in configs if entry.get("config_name") == config]
    if not chosen:
        got = "several configurations" if config is None else f"no configuration {config!r}"
        raise DataError(f"{folder}: has {got}: choose one of {', '.join(names)} (dataset_config)")
    patterns = _patterns(chosen[0].get("data_files"))
    if patterns is None:
        place = folder / str(chosen[0].get("data_dir"))
        return place if "data_dir" in chosen[0] and place.is_dir() else None
    if split not in patterns:
        raise DataError(f"{folder}: has no split {split!r}, its README.md names {', '.join(patterns)}")
    found = [file for pattern in patterns[split] for file in folder.glob(pattern)]
    if not found:
        raise DataError(f"{folder}: its README.md names {', '.join(patterns[split])}, which is not here")
    return found


def _configs(card):
    """The list `configs` in the head of a README.md; [] where it has none."""
    if not card.is_file():
        return []
    text = card.read_text(encoding="utf-8", errors="replace")
    head = text.removeprefix("---").partition("\n---")[0]
    if not text.startswith("---"):
        return []
    import yaml

    try:
        content = yaml.safe_load(head)
    except yaml.YAMLError:
        return []
    configs = content.get("configs") if isinstance(content, dict) else None
    return [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []


def _patterns(files):
    """{split: patterns} of what a card may write under `data_files`; None where it writes nothing that is known."""
    if isinstance(files, list) and files and isinstance(files[0], dict):
        files = {entry.get("split"): entry.get("path") for entry in files}
    elif isinstance(files, (str, list)):
        files = {"train": files}
    elif not isinstance(files, dict):
        return None
    return {str(split): _relative([paths] if isinstance(paths, str) else paths) for split, paths in files.items()}


def _relative(paths):
    return [path.removeprefix("./") for path in paths or () if isinstance(path, str) and not path.startswith("/")]
