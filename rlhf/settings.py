"""Settings and arguments by name: presets and YAML files, hints for a name that is not known, and what other trainers
take.
"""

import argparse
import difflib
import re
from pathlib import Path

PRESETS = Path(__file__).parent / "presets"
REFUSED = {
    "data_collator": "the trainer makes its batches itself, so that prompts can be shared",
    "compute_loss_func": "the loss is the stage's",
    "compute_metrics": "the metrics are the stage's; logits are never made, so none could be passed on",
    "preprocess_logits_for_metrics": "logits are never made",
    "optimizer_cls_and_kwargs": "give `optimizers`, or the settings optim and optim_args",
    "optimizers": "PPO steps policy and value network together, each with its own learning rate",
    "quantization_config": "load the model with it, and give the model",
}
"""Arguments of other libraries' trainers that have no meaning here, and why."""


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


class ToolParser(argparse.ArgumentParser):
    """The arguments of a tool; what is wrong with them is told in one line, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


class Written(float):
    """A number such as 1e-6, which YAML 1.1 takes for text; as text it is what was written."""

    def __new__(cls, text):
        number = super().__new__(cls, text)
        number.text = str(text)
        return number

    def __str__(self):
        return self.text


def read_yaml(path) -> dict:
    """The mapping that a YAML file holds; {} of an empty one. Every way to write a number is one, also 1e-6.

    Raises:
        UsageError: there is no such file, it is not YAML, or holds no mapping.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, and numbers."""

    Loader.add_implicit_resolver("!number", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
    Loader.add_constructor("!number", lambda loader, node: Written(loader.construct_scalar(node)))
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UsageError(f"--config: cannot read {path} ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds a {type(content).__name__}, wants a mapping of names to values")
    return content


def nearest(name, known, dashes=""):
    """A closing hint: the names most like `name`, or all if they are few."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(dashes + other for other in close)}?"
    return f"; known are {', '.join(known)}" if len(known) <= 12 else "; see --help"


def refuse(**arguments):
    """Raise for the first argument of another library's trainer that is given and would be ignored here."""
    for name, value in arguments.items():
        if name not in REFUSED:
            raise TypeError(f"got an unexpected argument {name!r}")
        if value is not None:
            raise ValueError(f"{name}: got {type(value).__name__}, wants None: {REFUSED[name]}")
