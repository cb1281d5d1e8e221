"""`rlhf pipeline`: SFT -> reward model -> PPO -> PPO-ptx on your model and your data, then an evaluation and a report.

A pipeline's directory holds one folder per stage and `pipeline.json`, which says with what settings it runs and which
stages are finished. Started again with the same settings it goes on where it stopped: finished stages are skipped, a
stage that was interrupted resumes from its newest checkpoint. With other settings it refuses.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from . import models
from .data import check_chats, load_rows, reading, split_rows
from .data.formats.base import others
from .data.rows import plain
from .data.store import prompt_digest
from .disk import lines_of
from .ranges import SEED, at_least, check, check_arguments, option
from .rewards.row_checks import usable
from .rewards.scoring import named, reward_functions
from .settings import ToolParser, preset_file, read_yaml
from .stages import Stage, Stages, check_names, fresh_or_resumed, make_config, settings_of, write_rows
from .training.stage import load_stage_tokenizer

SECTIONS = ("pipeline", "sft", "reward", "ppo", "ppo_ptx", "evaluate")


OTHER_SECTIONS = ("dpo", "kto", "demo")


def read_sections(path: str | Path, known: Sequence[str] = SECTIONS) -> dict[str, dict]:
    """Settings by section from a YAML file; a section that is missing is empty, other commands' are skipped."""
    found = read_yaml(path)
    if not all(isinstance(value, (dict, type(None))) for value in found.values()):
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
    for line in lines_of(folder / "metrics.jsonl"):
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
    from .ppo.trainer import PPOConfig, PPOTrainer

    given = {
        "sft_model_path": str(sft),
        "reward_model_path": str(reward),
        "dataset_name": str(prompts),
        "output_dir": str(folder),
    }
    given |= {"columns": None, "data_format": "own"}  # rows that were written here
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
    held_out_prompts: int = option(100, "Prompts kept for the evaluation.", at_least(1))
    seed: int = option(0, "Seed of all stages.", SEED)
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self):
        check(self)


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
    from .reports.report import text_table, write_report

    sections = stage_settings(args)
    models.resolve_model_path(args.model_name_or_path)
    prompts, texts = read_data(args, check_sections(sections, bool(args.ptx_dataset)))
    prompts, held_out = hold_out(prompts, args.held_out_prompts, args.seed, "prompts_dataset")
    held_out_texts = []
    if texts:
        texts, held_out_texts = hold_out(texts, 100, args.seed, "ptx_dataset")
    plan = [Stage("sft", "SFT")] if args.sft_dataset else []
    plan += [Stage("reward", "Reward model"), Stage("ppo", "PPO")]
    plan += [Stage("ppo_ptx", "PPO-ptx")] if texts else []
    plan += [Stage("evaluation", "Evaluation")]
    settings = {**dataclasses.asdict(args), "config": sections}
    for name in ("output_dir", "overwrite", "quiet"):
        del settings[name]
    stages = Stages(args.output_dir, plan, settings, overwrite=args.overwrite, quiet=args.quiet)
    data = stages.path / "data"
    prompts_file = write_rows(data / "prompts.jsonl", list(map(plain, prompts)))
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
        from .ppo.trainer import PPOConfig

        run = make_config(PPOConfig, "ppo", {**ppo, "ptx_coef": 0.0})
        options = {"response_length": run.response_length, "temperature": run.temperature, "seed": args.seed}
        options |= {"max_prompt_length": run.max_prompt_length}
        options |= {"long_prompts": "truncate" if run.long_prompts == "truncate" else "drop"}
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
        files.insert(0, preset_file(args.preset))
    for file in files:
        for name, found in read_sections(file).items():
            if name != "pipeline":
                sections[name].update(found)
    return sections


def read_data(args: PipelineConfig, configs: dict) -> tuple[list[dict], list[dict]]:
    """(prompts, pretraining texts). All data, read as their stages will read them.

    Args:
        configs: of `check_sections`.
    """

    def read(name, kind, stage, **options):
        run = configs[stage]
        options |= {"split": run.dataset_train_split, "config": run.dataset_config, **reading(run)}
        rows = load_rows(name, kind, **options)
        return check_chats(tokenizers[stage], rows, run.bad_rows, what=kind, num_proc=run.dataset_num_proc)

    first = configs["sft"].chat_template if args.sft_dataset else None  # which later stages find with the model
    tokenizers = {stage: _tokenizer(args.model_name_or_path, run, first) for stage, run in configs.items()}
    if args.sft_dataset:
        read(args.sft_dataset, "sft", "sft")
    prompts = read(args.ranked_dataset, "ranked", "reward")
    functions = named(reward_functions(None, configs["ppo"].reward_function))
    if args.prompts_dataset:
        prompts = read(args.prompts_dataset, "prompts", "ppo", columns=bool(functions))
        prompts = [{**others(row), "prompt": row["prompt"], "at": row["at"]} for row in prompts]
    else:
        prompts = [{"prompt": row["prompt"], "at": row["at"]} for row in prompts]
    prompts = usable(functions, prompts, configs["ppo"].bad_rows, has_reward_model=True)
    for row in prompts:
        del row["at"]
    prompts = list({prompt_digest(row): row for row in prompts}.values())
    skip = {"bad_rows": configs["ppo"].bad_rows, "num_proc": configs["ppo"].dataset_num_proc}
    return prompts, load_rows(args.ptx_dataset, "text", **skip) if args.ptx_dataset else []


def _tokenizer(model: str, run, template: str | None):
    names = ("trust_remote_code", "pad_token", "eos_token", "chat_template")
    given = SimpleNamespace(model_name_or_path=model, **{name: getattr(run, name) for name in names})
    given.chat_template = given.chat_template or template
    return load_stage_tokenizer(given)


def check_sections(sections: dict[str, dict], with_ptx: bool) -> dict:
    """The configs of sft, reward and ppo; unknown settings of every stage, and wrong values, are an error."""
    from .evaluate import SAMPLING
    from .ppo.trainer import PPOConfig
    from .reward import RewardConfig
    from .sft import SFTConfig

    found = {
        "sft": make_config(SFTConfig, "sft", sections["sft"]),
        "reward": make_config(RewardConfig, "reward", sections["reward"]),
    }
    ptx = {"ptx_dataset_name": "of the pipeline"}
    found["ppo"] = make_config(PPOConfig, "ppo", ptx, sections["ppo"])
    make_config(PPOConfig, "ppo_ptx", ptx, sections["ppo"], sections["ppo_ptx"])
    if sections["ppo_ptx"] and not with_ptx:
        raise ValueError("ppo_ptx: the section has settings, but no --ptx_dataset is given")
    check_names("evaluate", sections.get("evaluate", {}), [*SAMPLING, "dtype"])
    check_arguments(SAMPLING, sections.get("evaluate", {}))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = ToolParser(
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
    return 0
