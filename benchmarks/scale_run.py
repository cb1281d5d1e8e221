"""A PPO iteration on this machine beside the formulas of benchmarks/scale.py: bytes counted, seconds as ratios.

    python -m benchmarks.scale_run demo                     # or 135M: SmolLM-135M's shape, random weights
    ACCELERATE_USE_FSDP=true FSDP_VERSION=2 torchrun --nproc_per_node=2 -m benchmarks.scale_run 135M

Bytes are those of the tensors that a process holds right behind an optimizer step. Seconds are compared with the
products' and the memory's rate on the same machine, measured before and after the iteration: their shares of the run's
rates are what `scale.Machine` assumes of a GPU. `--cpu-seconds` counts the process's own seconds in place of those that
pass, for one thread on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import scale
from rlhf import data, models
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.ppo import state as ppo_state
from rlhf.ppo.sharding import local

PROMPTS = Path(models.DEMO_MODEL).parent / "prompts.jsonl"
SHAPES = {"demo": scale.DEMO, "135M": scale.SMALL}
LAYOUTS = {"float32": scale.FLOAT32, "bfloat16": scale.BFLOAT16, "lora": scale.LORA}


def write_models(shape: scale.Shape, folder: Path) -> None:
    """Policy and reward model of a shape, random but for the demo's policy, with the demo's tokenizer."""
    tokenizer = models.load_tokenizer("demo")
    policy = models.load_policy("demo") if shape is scale.DEMO else random_llama(shape, tokenizer)
    models.save_model(policy, tokenizer, folder / "policy")
    reward_model = models.reward_model_from_policy(policy, 0, pad_token_id=tokenizer.pad_token_id)
    models.save_model(reward_model, tokenizer, folder / "reward")


def random_llama(shape: scale.Shape, tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocab, tie_word_embeddings=shape.tied, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def held(trainer: PPOTrainer) -> dict[str, int]:
    """Bytes that this process holds: weights of all networks, gradients, AdamW's moments."""
    found = dict.fromkeys(("weights", "gradients", "moments"), 0)
    networks = (trainer.policy, trainer.reference, trainer.value, trainer.reward_model)
    weights = {id(weight): weight for network in networks if network is not None for weight in network.parameters()}
    for weight in weights.values():
        state = trainer.optimizer.state.get(weight, {})
        found["weights"] += local(weight).nbytes
        found["gradients"] += 0 if weight.grad is None else local(weight.grad).nbytes
        found["moments"] += sum(local(state[name]).nbytes for name in ("exp_avg", "exp_avg_sq") if name in state)
    return found


def rates(dtype: torch.dtype, clock) -> tuple[float, float]:
    """(operations a second of a product of that type, bytes a second of a sum over 512 MiB), the best of five."""
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    large = torch.ones(128 << 20)
    return 2 * 1024**3 / best(lambda: a @ b, clock), large.nbytes / best(large.sum, clock)


def best(call, clock) -> float:
    found = []
    for _ in range(5):
        start = clock()
        call()
        found.append(clock() - start)
    return min(found)


def expected(shape, layout, metrics: dict, longest: int, flops: float, reads: float, processes: int) -> dict:
    """Seconds of the phases by the formulas, from the tokens that the iteration had and the rates of the machine."""
    passes = 2 if layout.adapter_rank else 3
    tokens = metrics["throughput/score_tokens_per_sec"] * metrics["time/score"] / processes
    labels = metrics["throughput/rollout_tokens_per_sec"] * metrics["time/rollout"] / processes
    policy, scalar = scale.forward_flops(shape, tokens, labels), scale.forward_flops(shape, tokens)
    return {
        "rollout": max(policy / flops, longest * layout.entry * shape.policy / reads),
        "score": scalar / flops,
        "evaluate": (2 * policy + scalar) / flops,
        "update": passes * (policy + scalar) / flops,
    }


def iterate(
    shape: scale.Shape, layout: scale.Layout, folder: Path, rates=rates, clock=time.perf_counter, **settings
) -> dict:
    """Two PPO iterations on a shape; the bytes behind the last optimizer step, and the second one's phases."""
    rows = data.load_rows(PROMPTS, "prompts")[:64]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    dtype = torch.float32 if layout.entry == 4 else torch.bfloat16
    options = {
        "dtype": str(dtype), "use_peft": layout.adapter_rank > 0, "lora_r": layout.adapter_rank or 16,
        "rollout_batch_size": 16, "response_length": 32, "per_device_train_batch_size": 8, "num_ppo_epochs": 1,
        "max_steps": 2, "save_steps": 0, "disable_tqdm": True, "on_health": "ignore",
    }  # fmt: skip
    trainer = PPOTrainer(PPOConfig(
        sft_model_path=str(folder / "policy"), reward_model_path=str(folder / "reward"),
        dataset_name=str(folder / "prompts.jsonl"), output_dir=str(folder / "run"), **options | settings,
    ))  # fmt: skip
    found, lengths = {}, []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: found.update(held(trainer)))
    sample = trainer.sample
    trainer.sample = lambda rows: lengths.append(sample(rows)) or lengths[-1]
    before = rates(dtype, clock)
    metrics = {}
    with mock.patch.object(ppo_state, "time", SimpleNamespace(perf_counter=clock)):  # the clock of `timed`
        while trainer.step < trainer.iterations:
            metrics = trainer.iteration()
    flops, reads = (max(pair) for pair in zip(before, rates(dtype, clock), strict=True))
    longest = max(map(len, lengths[-1].response_ids))
    by_formula = expected(shape, layout, metrics, longest, flops, reads, trainer.world)
    seconds = {name: [metrics[f"time/{name}"], by_formula[name]] for name in by_formula}
    return {"bytes": found, "seconds": seconds, "gflops": flops / 1e9, "gb_s": reads / 1e9}


def lines(shape: scale.Shape, layout: scale.Layout, processes: list[dict]) -> list[str]:
    """What each process held beside the formula, and the first one's phases."""
    by_formula, shown = scale.states(shape, layout), []
    for name, wanted in by_formula.items():
        own = [process["bytes"][name] for process in processes]
        shown.append(f"{name}: {' + '.join(map(str, own))} = {sum(own)} bytes; formula {wanted}")
    first = processes[0]
    shown.append(f"a product: {first['gflops']:.0f} GFLOP/s; a sum: {first['gb_s']:.1f} GB/s")
    for name, (measured, formula) in first["seconds"].items():
        shown.append(f"{name}: {measured:.3g} s; formula {formula:.3g} s; ratio {measured / formula:.2g}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--responses", type=int, default=16, help="an iteration, even")
    parser.add_argument("--cpu-seconds", action="store_true", help="of the process, not those that pass")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead")
    parser.add_argument("--layout", default="float32", choices=LAYOUTS)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    layout = LAYOUTS[arguments.layout]
    with tempfile.TemporaryDirectory() as folder:
        write_models(shape, Path(folder))
        clock = time.process_time if arguments.cpu_seconds else time.perf_counter
        sizes = {"rollout_batch_size": arguments.responses, "per_device_train_batch_size": arguments.responses // 2}
        found = iterate(shape, layout, Path(folder), clock=clock, **sizes)
        processes = gather_object([found])
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(processes) if arguments.json else "\n".join(lines(shape, layout, processes)), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
