"""Settings and arguments by name: presets, hints for a name that is not known, and what other trainers take."""

import difflib
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
