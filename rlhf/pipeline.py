"""`rlhf pipeline`: SFT -> reward model -> PPO -> PPO-ptx on your model and your data, then an evaluation and a report.

A pipeline's directory holds one folder per stage and `pipeline.json`, which says with what settings it runs and which
stages are finished. Started again with the same settings it goes on where it stopped: finished stages are skipped, a
stage that was interrupted resumes from its newest checkpoint. With other settings it refuses.
"""

import argparse
import contextlib
import dataclasses
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from . import models
from .checkpoint import last_checkpoint, write_json
from .cli import nearest
from .data import load_rows, split_rows

SECTIONS = ("pipeline", "sft", "reward", "ppo", "ppo_ptx", "evaluate")
OTHER_SECTIONS = ("dpo", "demo")
PRESETS = Path(__file__).parent / "presets"
STATE = "pipeline.json"


def duration(seconds: float) -> str:
    """Seconds for people: '8 s', '1 min 20 s', '2 h 05 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of the plan: its folder's name, its title for people, and how long it should take (None: unknown)."""

    name: str
    title: str
    seconds: float | None = None


class Stages:
    """Runs a plan of stages in one directory, remembers what is finished, and prints one line for each.

    Args:
        output_dir: the pipeline's directory.
        plan: all stages, in order.
        config: settings that must be the same when the run is continued; plain JSON values.
        overwrite: remove another run that is in the way.
        quiet: what the stages print goes to `<output_dir>/log.txt`; False lets their progress bars through.
    Raises:
        ValueError: output_dir holds a run with other settings, or files that are no run.
    """

    def __init__(self, output_dir, plan: Sequence[Stage], config: dict, *, overwrite: bool = False, quiet: bool = True):
        self.path, self.plan, self.quiet = Path(output_dir), list(plan), quiet
        self.config = json.loads(json.dumps(config, default=str))
        self.spent = self.expected = 0.0
        if overwrite and (self.path / STATE).exists():
            shutil.rmtree(self.path)
        self.finished: dict[str, dict] = self._read_state()
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_state()

    def _read_state(self) -> dict:
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return {}
        remedy = "choose another --output_dir, or remove it with --overwrite"
        if not (self.path / STATE).exists():
            raise ValueError(f"output_dir {str(self.path)!r} is not empty and holds no pipeline: choose another one")
        state = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        before = state["config"]
        other = sorted(key for key in before.keys() | self.config.keys() if before.get(key) != self.config.get(key))
        if other:
            which = ", ".join(other)
            raise ValueError(
                f"output_dir {str(self.path)!r} already holds a run with other settings ({which}): {remedy}"
            )
        return state["finished"]

    def _write_state(self) -> None:
        write_json(self.path / STATE, {"config": self.config, "finished": self.finished})

    def folder(self, name: str) -> Path:
        return self.path / name

    @property
    def seconds(self) -> float:
        """Time spent on finished stages, in this and earlier starts."""
        return sum(entry["seconds"] for entry in self.finished.values())

    def time_left(self) -> float | None:
        """Expected seconds of the stages still to run: the plan's, scaled by how fast this machine has been so far."""
        rest = [stage.seconds for stage in self.plan if stage.name not in self.finished]
        if any(seconds is None for seconds in rest):
            return None
        pace = min(max(self.spent / self.expected, 0.2), 20.0) if self.expected else 1.0
        return pace * sum(rest)

    def run(self, name: str, work: Callable[[Path], str]) -> None:
        """Run `work(folder)` unless it is finished; it returns a few words about the outcome for the stage's line."""
        number = next(i for i, stage in enumerate(self.plan, 1) if stage.name == name)
        stage = self.plan[number - 1]
        head = f"[{number}/{len(self.plan)}] {stage.title}"
        if name in self.finished:
            entry = self.finished[name]
            print(f"{head}: {entry['text']}; done before, in {duration(entry['seconds'])}", flush=True)
            return
        start = time.perf_counter()
        with self._ticking(head, stage, start), self._captured():
            text = work(self.folder(name))
        seconds = time.perf_counter() - start
        self.finished[name] = {"seconds": seconds, "text": text}
        self._write_state()
        if stage.seconds is not None:
            self.spent, self.expected = self.spent + seconds, self.expected + stage.seconds
        left = self.time_left()
        more = f", about {duration(left)} left" if left else ""
        print(f"{head}: {text}; {duration(seconds)}{more}", flush=True)

    @contextlib.contextmanager
    def _captured(self):
        if not self.quiet:
            yield
            return
        with (
            open(self.path / "log.txt", "a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            yield

    @contextlib.contextmanager
    def _ticking(self, head: str, stage: Stage, start: float):
        """On a terminal: the line of the running stage, counting seconds. Elsewhere nothing."""
        if not self.quiet:
            print(head, flush=True)
        if not self.quiet or not sys.stdout.isatty():
            yield
            return
        out, done = sys.stdout, threading.Event()

        def tick():
            while not done.wait(0.5):
                about = f" of about {duration(stage.seconds)}" if stage.seconds else ""
                out.write(f"\r\033[K{head}: {duration(time.perf_counter() - start)}{about}")
                out.flush()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            out.write("\r\033[K")


def check_names(section: str, names, known) -> None:
    """Raise ValueError for the first of `names` that is not known, with the ones that look like it."""
    for name in names:
        if name not in known:
            raise ValueError(f"{section}: there is no setting {name!r}{nearest(str(name), sorted(known))}")


def settings_of(config_class) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class) if field.init}


def make_config(config_class, section: str, *layers: dict):
    """An instance of a stage's config from layers of settings, later ones winning.

    Raises:
        ValueError: a setting that the stage does not know.
    """
    merged = {key: value for layer in layers for key, value in layer.items()}
    check_names(section, merged, settings_of(config_class))
    return config_class(**merged)


def fresh_or_resumed(folder: Path) -> dict:
    """Settings that let a stage go on from its newest checkpoint; an interrupted stage without one starts anew."""
    if last_checkpoint(folder):
        return {"resume_from_checkpoint": "true"}
    if folder.exists():
        shutil.rmtree(folder)
    return {}


def write_rows(path: Path, rows: Sequence[dict]) -> Path:
    """Write rows as jsonl, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    kept = [{key: value for key, value in row.items() if key != "at"} for row in rows]
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    part.replace(path)
    return path


def read_sections(path: str | Path, known: Sequence[str] = SECTIONS) -> dict[str, dict]:
    """Settings by section from a YAML file; a section that is missing is empty, other commands' are skipped."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"config: {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not all(isinstance(value, (dict, type(None))) for value in found.values()):
        raise ValueError(f"config: {path} must hold sections ({', '.join(known)}), each with `setting: value` lines")
    unknown = sorted(set(found) - set(known) - set(OTHER_SECTIONS))
    if unknown:
        raise ValueError(f"config: {path} has the unknown section {', '.join(unknown)}; known are: {', '.join(known)}")
    return {name: dict(found.get(name) or {}) for name in known}


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["summary"]


def last_metrics(folder: Path) -> dict:
    """The last value of every metric of a run."""
    merged: dict = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        merged.update(json.loads(line))
    return merged


def train_sft(folder: Path, *, model, dataset, settings: dict) -> str:
    from .sft import SFTConfig, train_sft

    given = {"model_name_or_path": str(model), "dataset_name": str(dataset), "output_dir": str(folder)}
    train_sft(make_config(SFTConfig, "sft", settings, given, fresh_or_resumed(folder)))
    loss = summary_of(folder).get("eval/loss")
    return f"held-out loss {loss:.3f} nats a token" if loss is not None else "trained"


def train_reward(folder: Path, *, model, dataset, settings: dict) -> str:
    from .reward import RewardConfig, train_reward

    given = {"model_name_or_path": str(model), "dataset_name": str(dataset), "output_dir": str(folder)}
    train_reward(make_config(RewardConfig, "reward", settings, given, fresh_or_resumed(folder)))
    summary = summary_of(folder)
    if summary.get("eval/accuracy") is None:
        return "trained"
    accuracy, longer = (f"{100 * summary[f'eval/{name}']:.1f} %" for name in ("accuracy", "longer_wins"))
    return f"right on {accuracy} of held-out pairs (longer wins: {longer})"


def train_ppo(
    folder: Path, *, sft, reward, prompts, settings: dict, section: str = "ppo", ptx=None, trainer=None
) -> str:
    """PPO, or PPO-ptx where `ptx` is a file of pretraining text. `trainer`: another class than PPOTrainer."""
    from .ppo import PPOConfig, PPOTrainer

    given = {
        "sft_model_path": str(sft),
        "reward_model_path": str(reward),
        "dataset_name": str(prompts),
        "output_dir": str(folder),
    }
    if ptx is not None:
        given["ptx_dataset_name"] = str(ptx)
    defaults = {"ptx_coef": 1.0} if ptx is not None else {}
    args = make_config(PPOConfig, section, defaults, settings, given, fresh_or_resumed(folder))
    (trainer or PPOTrainer)(args).train()
    last = last_metrics(folder)
    stopped = f" (stopped at iteration {last['step']} by max_kl)" if summary_of(folder).get("stopped") else ""
    return f"reward {last['objective/scores']:+.2f} at {last['objective/kl']:.1f} nats from SFT{stopped}"


@dataclasses.dataclass
class PipelineConfig:
    """What `rlhf pipeline` needs; the stages' own settings stand in the sections of YAML files (`config`, `preset`)."""

    model_name_or_path: str
    ranked_dataset: str
    output_dir: str
    sft_dataset: str | None = None
    prompts_dataset: str | None = None
    ptx_dataset: str | None = None
    config: str | None = None
    preset: str | None = None
    held_out_prompts: int = 100
    seed: int = 0
    overwrite: bool = False
    quiet: bool = False


def hold_out(rows: Sequence[dict], count: int, seed: int, what: str) -> tuple[list[dict], list[dict]]:
    """(train, held out) with about `count` of the rows held out, and never more than half."""
    fraction = min(0.5, count / len(rows))
    if len(rows) < 2:
        raise ValueError(f"{what} must hold at least 2 rows, one of them to hold out, got {len(rows)}")
    return split_rows(rows, fraction, seed)


def run_pipeline(args: PipelineConfig) -> Path:
    """Run (or continue) all stages, evaluate, write report.html, and return its path.

    Raises:
        ValueError: bad data, a model that cannot be loaded, an unknown setting, or an output_dir in use; all before any
            training starts.
    """
    from .evaluate import evaluate_policies, write_evaluation
    from .report import text_table, write_report

    sections = stage_settings(args)
    models.resolve_model_path(args.model_name_or_path)
    models.load_tokenizer(args.model_name_or_path)
    ranked = load_rows(args.ranked_dataset, "ranked")
    prompts = load_rows(args.prompts_dataset, "prompts") if args.prompts_dataset else ranked
    prompts = list({json.dumps(row["prompt"]): {"prompt": row["prompt"]} for row in prompts}.values())
    prompts, held_out = hold_out(prompts, args.held_out_prompts, args.seed, "prompts_dataset")
    if args.sft_dataset:
        load_rows(args.sft_dataset, "sft")
    texts, held_out_texts = [], []
    if args.ptx_dataset:
        texts, held_out_texts = hold_out(load_rows(args.ptx_dataset, "text"), 100, args.seed, "ptx_dataset")
    check_sections(sections, bool(texts))
    plan = [Stage("sft", "SFT")] if args.sft_dataset else []
    plan += [Stage("reward", "Reward model"), Stage("ppo", "PPO")]
    plan += [Stage("ppo_ptx", "PPO-ptx")] if texts else []
    plan += [Stage("evaluation", "Evaluation")]
    settings = {**dataclasses.asdict(args), "config": sections}
    for name in ("output_dir", "overwrite", "quiet"):
        del settings[name]
    stages = Stages(args.output_dir, plan, settings, overwrite=args.overwrite, quiet=args.quiet)
    data = stages.path / "data"
    prompts_file = write_rows(data / "prompts.jsonl", prompts)
    ptx_file = write_rows(data / "ptx.jsonl", texts) if texts else None
    common = {"seed": args.seed}
    sft = stages.folder("sft") if args.sft_dataset else args.model_name_or_path
    if args.sft_dataset:
        start = {
            "model": args.model_name_or_path,
            "dataset": args.sft_dataset,
            "settings": {**common, **sections["sft"]},
        }
        stages.run("sft", lambda f: train_sft(f, **start))
    reward, rankings = (
        stages.folder("reward"),
        {"dataset": args.ranked_dataset, "settings": {**common, **sections["reward"]}},
    )
    stages.run("reward", lambda f: train_reward(f, model=sft, **rankings))
    inputs = {"sft": sft, "reward": reward, "prompts": prompts_file}
    ppo = {**common, **sections["ppo"]}
    stages.run("ppo", lambda f: train_ppo(f, settings={**ppo, "ptx_coef": 0.0}, **inputs))
    policies = {"base": args.model_name_or_path, "SFT": sft} if args.sft_dataset else {"SFT": sft}
    policies["PPO"] = stages.folder("ppo")
    if texts:
        with_ptx = {**ppo, **sections["ppo_ptx"]}
        stages.run("ppo_ptx", lambda f: train_ppo(f, settings=with_ptx, section="ppo_ptx", ptx=ptx_file, **inputs))
        policies["PPO-ptx"] = stages.folder("ppo_ptx")

    def evaluate(folder: Path) -> str:
        from .ppo import PPOConfig

        run = make_config(PPOConfig, "ppo", {**ppo, "ptx_coef": 0.0})
        options = {"response_length": run.response_length, "temperature": run.temperature, "seed": args.seed}
        found = evaluate_policies(
            policies,
            [row["prompt"] for row in held_out],
            reward_model=reward,
            texts=[row["text"] for row in held_out_texts],
            **{**options, **sections["evaluate"]},
        )
        write_evaluation(stages.path, {"title": f"rlhf pipeline: {args.model_name_or_path}", **found})
        return f"{len(policies)} policies on {found['prompts']} held-out prompts"

    stages.run("evaluation", evaluate)
    report = write_report(stages.path)
    evaluation = json.loads((stages.path / "evaluation.json").read_text(encoding="utf-8"))
    print(f"\n{text_table(evaluation['policies'])}\n{evaluation['note']}\n\nReport: {report}", flush=True)
    return report


def stage_settings(args: PipelineConfig) -> dict[str, dict]:
    """Settings of the stages by section: the preset's, overridden by those of the config file."""
    sections: dict[str, dict] = {name: {} for name in SECTIONS if name != "pipeline"}
    files = [args.config] if args.config else []
    if args.preset:
        names = sorted(file.stem for file in PRESETS.glob("*.yaml"))
        if args.preset not in names:
            raise ValueError(f"preset: got {args.preset!r}, which does not exist; known are: {', '.join(names)}")
        files.insert(0, PRESETS / f"{args.preset}.yaml")
    for file in files:
        for name, found in read_sections(file).items():
            if name != "pipeline":
                sections[name].update(found)
    return sections


def check_sections(sections: dict[str, dict], with_ptx: bool) -> None:
    """Find unknown settings of every stage before the first one starts."""
    from .ppo import PPOConfig
    from .reward import RewardConfig
    from .sft import SFTConfig

    classes = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig, "ppo_ptx": PPOConfig}
    for name, config_class in classes.items():
        check_names(name, sections[name], settings_of(config_class))
    if sections["ppo_ptx"] and not with_ptx:
        raise ValueError("ppo_ptx: the section has settings, but no --ptx_dataset is given")
    known = ("response_length", "temperature", "samples_per_prompt", "seed", "batch_size", "dtype")
    check_names("evaluate", sections.get("evaluate", {}), known)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rlhf pipeline",
        description="SFT -> reward model -> PPO (and PPO-ptx) on your model and data, then an evaluation and "
        "report.html. Started again with the same settings, it goes on where it stopped.",
    )
    parser.add_argument("--model_name_or_path", help="causal language model: a folder, or 'demo'")
    parser.add_argument("--ranked_dataset", help="prompt + completions + ranks, or chosen + rejected")
    parser.add_argument("--sft_dataset", help="prompt + completion, or messages; without it SFT is skipped")
    parser.add_argument("--prompts_dataset", help="prompts for PPO and the evaluation; default: those of the rankings")
    parser.add_argument("--ptx_dataset", help="pretraining text (`text`, or .txt): adds PPO-ptx and the tax")
    parser.add_argument("--output_dir", help="directory for all stages and report.html")
    parser.add_argument("--config", help=f"YAML file of settings in sections: {', '.join(SECTIONS)}")
    parser.add_argument("--preset", help="named settings of the stages (instructgpt); --config overrides them")
    parser.add_argument("--held_out_prompts", type=int, default=100, help="prompts kept for the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier pipeline in output_dir")
    parser.add_argument("--quiet", action="store_true", help="one line per stage; the rest goes to output_dir/log.txt")
    try:
        file = parser.parse_args(argv).config
        own = read_sections(file)["pipeline"] if file else {}
        check_names("pipeline", own, settings_of(PipelineConfig) - {"config"})
        parser.set_defaults(**own)
        args = parser.parse_args(argv)
        for name in ("model_name_or_path", "ranked_dataset", "output_dir"):
            if getattr(args, name) is None:
                raise ValueError(f"{name} is missing: give --{name}, or {name} in the section pipeline of --config")
        run_pipeline(PipelineConfig(**vars(args)))
    except ValueError as error:
        parser.exit(2, f"rlhf pipeline: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nrlhf pipeline: stopped; the same command goes on where it was\n")
    return 0
