"""The command `rlhf`: one sub-command a stage, YAML settings, one clear line when something is wrong.

torch is imported only after the sub-command is known, and after THP_MEM_ALLOC_ENABLE is set: it makes torch ask the
kernel for huge pages, which saves about a third of the time on a CPU.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import textwrap
import typing
from pathlib import Path

from . import extras
from .errors import RunError
from .interrupt import Interrupted, enabled
from .ranges import alternatives, is_numeric
from .settings import PRESETS, UsageError, nearest, preset_file, preset_names, read_yaml

STAGES = {
    "sft": ("rlhf.sft", "SFTConfig", "train_sft", "stage 1: fine-tune a language model on demonstrations"),
    "reward": ("rlhf.reward", "RewardConfig", "train_reward", "stage 2: train a reward model on rankings"),
    "ppo": ("rlhf.ppo", "PPOConfig", "train_ppo", "stage 3: PPO, and PPO-ptx with --ptx_coef, against the reward"),
    "dpo": ("rlhf.preference", "DPOConfig", "train_dpo", "preferences without a reward model (DPO and its family)"),
    "kto": ("rlhf.preference", "KTOConfig", "train_kto", "single responses that are desired or not (KTO)"),
}
TOOLS = {
    "best-of-n": ("rlhf.evaluate", "sample N responses, keep the one that the reward model scores highest"),
    "data": ("rlhf.reports.data_set", "what a data set holds, as a stage would read it; writes it in our format"),
    "pipeline": ("rlhf.pipeline", "all stages, one after the other, from one YAML file"),
    "report": ("rlhf.reports.report", "write report.html of a run"),
    "env": ("rlhf.environment", "versions, backends, threads and GPUs of this machine, for a bug report"),
    "demo": ("rlhf.demo.run", "all stages on the embedded story model, in minutes"),
}
GOES_ON = {
    **dict.fromkeys(STAGES, "; the same command with --resume_from_checkpoint true goes on from the last checkpoint"),
    **dict.fromkeys(("pipeline", "demo"), "; the same command goes on where it was"),
}
"""What to do about a command that was stopped; of the others there is nothing to tell."""
SECTIONS = (*STAGES, "ppo_ptx", "pipeline", "demo")
INDENT = 34
NULL = "\0null"  # what no command line can hold
NEGATIVE_NUMBER = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^-(inf|infinity|nan)$", re.IGNORECASE)
"""Words that argparse takes for values, not for flags: all that float() reads."""


def main(argv=None):
    """Run one command; returns the exit status: 0, or 2 after an error that the user can mend."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = run_command(argv) or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"\nrlhf: stopped{GOES_ON.get(argv[0] if argv else '', '')}", file=sys.stderr)
        return 128 + signal.SIGINT
    except Interrupted as stop:
        print(f"rlhf: {stop}{GOES_ON[argv[0]]}", file=sys.stderr)
        return 128 + stop.number
    except BrokenPipeError:  # `rlhf ... | head` has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is left in the buffer goes nowhere, now and at the exit
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, FloatingPointError, RunError) as error:
        if os.environ.get("RLHF_DEBUG") == "1":
            raise
        print(f"rlhf: error: {error}", file=sys.stderr)
        return 2


def run_command(argv):
    """What `main` does, with errors as exceptions."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"rlhf {importlib.import_module('rlhf_kernels').__version__}")
        return 0
    command, rest = argv[0], argv[1:]
    if command in (*STAGES, *TOOLS) and command != "env":
        lacking = extras.lacking()
        if lacking:
            raise UsageError(f"rlhf {command} {lacking}")
    if command in TOOLS:
        with enabled():
            return importlib.import_module(TOOLS[command][0]).main(rest)
    if command not in STAGES:
        raise UsageError(f"there is no command {command!r}{nearest(command, (*STAGES, *TOOLS))}")
    module, config_name, function, _ = STAGES[command]
    module = importlib.import_module(module)
    config_class = getattr(module, config_name)
    parser = make_parser(command, config_class)
    if {"-h", "--help", "--help-all"} & set(rest):
        print(stage_help(command, config_class, parser, everything="--help-all" in rest))
        return 0
    log_to_stderr()
    args = parse_stage(command, config_class, rest, parser)
    with enabled():
        output = getattr(module, function)(args)
    if os.environ.get("RANK", "0") == "0":
        from .reports.report import write_report

        print(f"the run is in {output}; its report: {write_report(output)}")
    return 0


def log_to_stderr():
    """Notes of the stages, such as how many rows were dropped, one line each."""
    logger = logging.getLogger("rlhf")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("rlhf: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def make_parser(command, config_class):
    """An argument parser of a stage's settings that raises UsageError instead of leaving the process."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(config_class, prog=f"rlhf {command}", add_help=False, allow_abbrev=False)

    def fail(message):
        raise UsageError(f"{command}: {message}")

    parser.error = fail
    parser._negative_number_matcher = NEGATIVE_NUMBER
    kinds = {name: alternatives(hint) for name, hint in typing.get_type_hints(config_class).items()}
    for action in parser._actions:
        if action.dest in kinds:
            action.type = or_null(action.type, kinds[action.dest])
    return parser


def or_null(kind, kinds):
    """The type of an argument, made to read also YAML's null and, of numbers, `none` and `null`.

    Raises:
        UsageError: the option takes no None.
    """
    text_too = not is_numeric(kinds) or str in kinds

    @functools.wraps(kind)
    def read(text):
        if text == NULL or (not text_too and text.lower() in ("none", "null") and type(None) in kinds):
            if type(None) not in kinds:
                raise argparse.ArgumentTypeError("got null, but takes no None")
            return None
        return kind(text)

    return read


def parse_stage(command, config_class, argv, parser=None):
    """A stage's settings: the preset, overridden by --config files, overridden by the flags.

    Raises:
        UsageError: an unknown flag, key, preset or section, a value of the wrong type. Names the nearest known ones.
    """
    parser = parser or make_parser(command, config_class)
    known = [item.name for item in dataclasses.fields(config_class) if item.init]
    files, flags = [], []
    rest = iter(argv)
    for token in rest:
        name, _, value = token.partition("=")
        if name not in ("--config", "--preset"):
            flags.append(token)
            continue
        value = value or next(rest, None)
        if value is None:
            raise UsageError(f"{command}: {name} needs a {'file' if name == '--config' else 'name'}")
        files.append(preset_file(value) if name == "--preset" else Path(value))
    files.sort(key=lambda file: file.parent != PRESETS)  # --config overrides --preset, in whatever order they came
    flags = [token for file in files for token in settings_as_flags(command, file, known)] + flags
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # what is not given is left to the dataclass
    given, unknown = parser.parse_known_args(flags)
    if unknown:
        name = unknown[0].partition("=")[0]
        if not name.startswith("-"):
            raise UsageError(f"{command}: does not know what to do with {name!r}")
        hint = nearest(name.strip("-").replace("-", "_"), ["config", "preset", "help", "help_all", *known], "--")
        raise UsageError(f"{command}: there is no flag {name}{hint}")
    return config_class(**{name: None if value == [None] else value for name, value in vars(given).items()})


def settings_as_flags(command, file, known):
    """The settings of one YAML file for one stage, as command-line flags, so that both are checked alike.

    The file maps names to values, or holds such a mapping under the stage's name; sections of other stages are skipped.
    """
    content = read_yaml(file)
    own = content.get(command)
    if own is not None and not isinstance(own, dict):
        raise UsageError(f"{file}: the section {command} holds a {type(own).__name__}, wants names and values")
    flat = {key: value for key, value in content.items() if key not in SECTIONS}
    flags = []
    for key, value in {**flat, **(own or {})}.items():
        if key not in known:
            raise UsageError(f"{file}: there is no setting {key!r} in rlhf {command}{nearest(str(key), known)}")
        if isinstance(value, list):
            flags += [f"--{key}", *map(as_argument, value)]
        else:
            flags.append(f"--{key}={as_argument(value)}")
    return flags


def as_argument(value):
    """A YAML value as one command-line word."""
    if value is None:
        return NULL
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def overview():
    """What `rlhf --help` prints."""
    lines = ["rlhf COMMAND [flags]: the InstructGPT method, stage by stage.", "", "stages:"]
    lines += [f"  {name:<11} {entry[-1]}" for name, entry in STAGES.items()]
    lines += ["", "tools:"]
    lines += [f"  {name:<11} {text}" for name, (_, text) in TOOLS.items()]
    lines += ["", "`rlhf COMMAND --help` lists its flags. RLHF_DEBUG=1 shows where in the code an error came from."]
    return "\n".join(lines)


def stage_help(command, config_class, parser, *, everything=False):
    """What `rlhf STAGE --help` prints: the stage's own flags in groups; with `everything`, the inherited ones too."""
    fields = {item.name: item for item in dataclasses.fields(config_class) if item.init}
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest in fields}
    groups = dict(getattr(config_class, "groups", {"settings": tuple(fields)}))
    shown = {name for names in groups.values() for name in names}
    lines = [f"rlhf {command} [flags]: {STAGES[command][-1]}.", ""]
    names = ", ".join(preset_names())
    lines += flag_lines("--preset NAME", f"Named settings; known: {names}. Flags override them.")
    lines += flag_lines("--config FILE", f"YAML file of settings, flat or under `{command}:`. Flags override it.")
    others = tuple(name for name in fields if name not in {*shown, *getattr(config_class, "refused", ())})
    if others:
        lines += flag_lines("--help-all", "Every flag, also those of transformers.TrainingArguments.")
    if others and everything:
        groups["all other settings of transformers.TrainingArguments"] = others
    texts = getattr(config_class, "inherited_help", {})
    paper = getattr(config_class, "paper", {})
    for title, members in groups.items():
        lines += ["", f"{title}:"]
        for name in members:
            action = actions[name]
            text = texts.get(name) or " ".join((action.help or "").split()).replace("%%", "%")
            text = text if name in shown else text.partition(". ")[0].rstrip(".") + "."
            lines += flag_lines(f"--{name} {placeholder(action)}".rstrip(), text + notes(action, paper.get(name)))
    return "\n".join(lines)


def placeholder(action):
    """What stands for a flag's value in the help."""
    choices = "{" + ",".join(map(str, action.choices or ())) + "}"
    if action.choices and len(choices) <= 50:
        return choices
    if action.default is True:
        return "{true,false}"
    names = {"int": "N", "float": "X", "str": "TEXT", "string_to_bool": ""}
    kind = names.get(getattr(action.type, "__name__", ""), "VALUE")
    return f"{kind} ..." if action.nargs == "+" else kind


def notes(action, paper):
    """(default ..., paper ...), as far as there is something to say."""
    default = getattr(action.default, "value", action.default)
    known = [] if default is None or default == "" or default is False else [f"default {default}"]
    return f" ({'; '.join(known + ([f'paper: {paper}'] if paper else []))})" if known or paper else ""


def flag_lines(flag, text):
    """A flag and its help, wrapped to the terminal."""
    width = max(min(shutil.get_terminal_size().columns, 120), 72) - INDENT
    wrapped = textwrap.wrap(text, width) or [""]
    head = [f"  {flag}"] if len(flag) + 4 > INDENT else []
    first = " " * INDENT if head else f"  {flag}".ljust(INDENT)
    return [*head, first + wrapped[0], *(" " * INDENT + line for line in wrapped[1:])]


if __name__ == "__main__":
    sys.exit(main())
