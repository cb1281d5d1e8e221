"""Steps of TRL, verl and OpenRLHF with their own functions and with ours, in a process under the peer's python.

    PYTHONPATH=. PYTHON -P -m benchmarks.peer_steps

A line of JSON comes in, {"case": {...}, "impl": "ours", "what": "first" | "turn"}, and one goes out. The process keeps
the step of one case and replaces functions in it, so that all implementations share a model, a batch and an optimizer.
A step is forward, backward and the optimizer's step on a random Llama of two layers. On a CPU it runs on one thread and
its seconds are the CPU's, which other work on the machine hardly moves.
"""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks import cases, roof

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STUBS = roof.ROOT / "tests" / "integrations" / "stubs"  # in the place of deepspeed and flash-attn
RATE = 1e-6  # the weights hardly move: every step does the same


@dataclass(kw_only=True)
class Step:
    """One step to run, the implementations it can run with, and what share of the positions has a label."""

    run: Callable[[], Tensor | tuple[Tensor, ...]]
    contexts: dict[str, Callable]
    model: torch.nn.Module | None = None
    labelled: float | None = None
    warm: bool = False  # the optimizer's states are there
    folder: tempfile.TemporaryDirectory | None = field(default=None, repr=False)


class Timed(cases.Call):
    """A step with one implementation."""

    def __init__(self, step: Step, impl: str):
        super().__init__(step.run)
        self.step, self.context = step, step.contexts[impl]

    def first(self) -> tuple[dict, float | None]:
        """What the row tells beside times, and the MiB on top of the model, gradients freed, optimizer states there."""
        with self.context():
            if not self.step.warm:
                self.run()
                self.step.warm = True
            if DEVICE == "cpu":
                _, peak = roof.peak_of(self.run)
            else:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                self.run()
                peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        facts = {"threads": torch.get_num_threads(), "clock": "cpu"}
        if DEVICE != "cpu":
            facts |= {"clock": "wall", "device": torch.cuda.get_device_name()}
        return facts | ({} if self.step.labelled is None else {"labelled": self.step.labelled}), peak

    def once(self) -> float:
        if DEVICE == "cpu":
            start = time.process_time()
            self.run()
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def turn(self) -> list[float]:
        with self.context():
            return super().turn()


@dataclass
class Texts:
    """Token ids of prompts and responses of different lengths, T at most for both."""

    prompts: list[list[int]]
    responses: list[list[int]]


def texts(sizes: dict[str, int]) -> Texts:
    """B texts, each half a quarter to half of T; token 0 pads and ends."""
    draw, half = random.Random(0), sizes["T"] // 2

    def ids() -> list[int]:
        return [draw.randrange(1, sizes["V"]) for _ in range(draw.randint(half // 2, half))]

    return Texts([ids() for _ in range(sizes["B"])], [ids() for _ in range(sizes["B"])])


def padded(rows: list[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    """(ids, mask) [B, longest]."""
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    ids = [pad + row if left else row + pad for row, pad in zip(rows, pads)]
    kept = [
        [0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad) for row, pad in zip(rows, pads)
    ]
    return torch.tensor(ids, device=DEVICE), torch.tensor(kept, device=DEVICE)


def language_model(sizes: dict[str, int]) -> torch.nn.Module:
    """A random Llama in fp32 of two layers of width H over V tokens, its head apart from its embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(sizes["H"] // 64, 1)
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes["V"], hidden_size=sizes["H"], intermediate_size=4 * sizes["H"], num_hidden_layers=2,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2 * sizes["T"],
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    ).to(DEVICE)  # fmt: skip


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)


# TRL


class NoHead:
    """In the place of TRL's head: gradients reach the hidden states and the weight, and nothing is scored."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
        log_probs = hidden.float().sum(-1) * 1e-6 + weight.float().sum() * 0 - math.log(len(weight))
        nothing = log_probs.detach() * 0
        extra = {"entropy": log_probs * 1, "is_top1": nothing.bool()}
        names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        return log_probs, *(extra.get(name, nothing) if name in outputs else None for name in names)


def _trl_contexts() -> dict[str, Callable]:
    import trl.trainer.utils as trl_utils

    from rlhf_kernels.integrations import trl as ours

    @contextmanager
    def replaced(**names):
        """`trl-labels`: TRL's head scores only positions with a label, as it does on a GPU."""
        with mock.patch.multiple(trl_utils, _use_triton=lambda device: True, **names):
            yield

    return {
        "ours": ours.patched,
        "ours-fast": partial(ours.patched, precision="fast"),
        "trl-labels": replaced,
        "trl": nullcontext,
        "backbone": partial(replaced, _ChunkedLogProbFunction=NoHead),
    }


def _tokenizer(vocabulary: int):
    """A word a token: the word "7" is the token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(token): token for token in range(vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", eos_token="0")


def _words(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def trl_step(kind: str, case: dict) -> Step:
    """A step of TRL's own trainer of this kind with its default loss, on a batch that it has collated itself.

    GRPO and RLOO get completions instead of generating them. bf16 is TRL's default, autocast on fp32 weights.
    """
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    sizes = case["sizes"]
    folder, found = tempfile.TemporaryDirectory(), texts(sizes)
    tokenizer = _tokenizer(sizes["V"])
    language_model(sizes).save_pretrained(folder.name)  # from where TRL takes the reference model too
    model = AutoModelForCausalLM.from_pretrained(folder.name, dtype=torch.float32)
    options = {
        "output_dir": str(Path(folder.name) / "run"), "use_cpu": DEVICE == "cpu", "bf16": case["dtype"] == "bf16",
        "report_to": "none", "max_steps": 1000, "learning_rate": RATE, "lr_scheduler_type": "constant", "seed": 0,
        "per_device_train_batch_size": sizes["B"], "gradient_checkpointing": False, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    prompts, completions = ([_words(row) for row in rows] for rows in (found.prompts, found.responses))
    pairs = list(zip(prompts, completions))
    names = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "grpo": "GRPO", "rloo": "RLOO"}
    trainer_class, config_class = (getattr(trl, names[kind] + end) for end in ("Trainer", "Config"))
    more = {}
    if kind in ("grpo", "rloo"):
        rows = [{"prompt": prompt} for prompt in prompts]
        options |= {"num_generations": 2, "max_completion_length": sizes["T"] // 2, "beta": 0.0}
        more = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)}
    else:
        options["max_length"] = None
        if kind == "sft":
            rows = [{"prompt": prompt + " ", "completion": text} for prompt, text in pairs]
        elif kind == "dpo":
            options["per_device_train_batch_size"] = sizes["B"] // 2
            rows = [
                {"prompt": prompt + " ", "chosen": text, "rejected": other}
                for (prompt, text), other in zip(pairs[::2], completions[1::2])
            ]
        else:
            rows = [{"prompt": p + " ", "completion": text, "label": i % 2 == 0} for i, (p, text) in enumerate(pairs)]
    trainer = trainer_class(
        model, args=config_class(**options), train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **more
    )
    if kind in ("grpo", "rloo"):
        batch, labelled = _completed(trainer, found)
        trainer._prepare_inputs = lambda inputs: batch
    else:
        batch = next(iter(trainer.get_train_dataloader()))
        labelled = _labelled(batch)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)

    def run():
        loss = trainer.training_step(model, batch, None)
        optimizer.step()
        model.zero_grad()
        return loss

    return Step(run=run, contexts=_trl_contexts(), model=trainer.model, labelled=labelled, folder=folder)


def _completed(trainer, found: Texts) -> tuple[dict, float]:
    """A batch of GRPO and RLOO as if it had been generated, and the share of positions with a label."""
    prompt_ids, prompt_mask = padded(found.prompts, left=True)
    ids, mask = padded(found.responses)
    batch = {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": ids, "completion_mask": mask,
        "advantages": torch.linspace(-1, 1, len(ids), device=DEVICE), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    inputs = torch.cat((prompt_ids, ids), 1), torch.cat((prompt_mask, mask), 1)
    with torch.no_grad():
        log_probs = trainer._get_per_token_logps_and_entropies(trainer.model, *inputs, ids.shape[1])[0]
    batch["old_logps"] = (log_probs * mask).sum(1)
    return batch, mask.sum().item() / inputs[0][:, 1:].numel()


def _labelled(batch: dict) -> float:
    """The share of positions that a collated batch has labels for; KTO's own completions, DPO's pairs."""
    if "labels" in batch:
        return (batch["labels"][:, 1:] != -100).float().mean().item()
    mask = next(batch[name] for name in ("completion_mask", "completion_labels") if name in batch)
    kept = mask != -100 if mask.min() < 0 else mask != 0
    return kept[:, 1:].float().mean().item()


def trl_head(case: dict) -> Step:
    """TRL's fused head alone, every position with a label: log-probs and entropy, forward and backward."""
    import trl.trainer.utils as trl_utils

    sizes, dtype = case["sizes"], cases.DTYPES[case["dtype"]]
    torch.manual_seed(0)
    hidden = torch.randn(sizes["N"], sizes["H"], device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(sizes["V"], sizes["H"], device=DEVICE) * 0.1).to(dtype).requires_grad_()
    labels = torch.randint(sizes["V"], (sizes["N"],), device=DEVICE)

    def run():
        outputs = ("entropy",)
        log_probs, entropy, *_ = trl_utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
        )
        loss = -log_probs.mean() - 0.01 * entropy.mean()
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    return Step(run=run, contexts=_trl_contexts())


# verl and OpenRLHF


def _rollout(sizes: dict[str, int]) -> dict[str, Tensor]:
    """Prompts padded on the left, responses on the right, and what PPO knows of the responses."""
    found = texts(sizes)
    prompts, prompt_mask = padded(found.prompts, left=True)
    responses, mask = padded(found.responses)
    torch.manual_seed(1)
    return {
        "ids": torch.cat((prompts, responses), 1), "attention": torch.cat((prompt_mask, mask), 1), "mask": mask,
        "old": -math.log(sizes["V"]) + 0.02 * torch.randn(mask.shape, device=DEVICE),  # far from the clip
        "advantages": torch.randn(mask.shape, device=DEVICE),
    }  # fmt: skip


def verl_actor(case: dict) -> Step:
    """What verl's FSDP engine and `ppo_loss` do with a micro batch: log-probs and entropy, policy loss and its bonus.

    From logits, or with the fused head (`use_fused_kernels=True`, backend torch). bf16 is autocast, as in the engine.
    """
    import verl.utils.torch_functional as verl_F
    from verl.trainer.ppo import core_algos
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.workers.config.actor import ActorConfig

    from rlhf_kernels.integrations import verl as ours

    ours.register()
    sizes, batch = case["sizes"], _rollout(case["sizes"])
    model, ids, mask = language_model(sizes), batch["ids"], batch["mask"].bool()
    optimizer, length = optimizer_of(model), mask.shape[1]
    attention = batch["attention"].bool()
    rolled = ids.roll(-1, 1)
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    chosen = {"loss": "vanilla"}

    def scored() -> tuple[Tensor, Tensor]:
        if case["variant"] == "fused":
            hidden = model.model(ids, attention_mask=batch["attention"]).last_hidden_state
            return FusedLinearForPPO()(hidden, model.lm_head.weight, rolled, temperature=1.0)
        logits = model(ids, attention_mask=batch["attention"]).logits
        entropy = verl_F.entropy_from_logits(logits)
        found = verl_F.logprobs_from_logits(logits[attention], rolled[attention])
        return found.new_zeros(ids.shape).masked_scatter(attention, found), entropy

    def run():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=case["dtype"] == "bf16"):
            log_probs, entropy = (x[:, -length - 1 : -1].float() for x in scored())
            loss, _ = core_algos.get_policy_loss_fn(chosen["loss"])(
                batch["old"], log_probs, batch["advantages"], mask, "token-mean", config
            )
            loss = loss - 0.01 * core_algos.agg_loss(entropy, mask, "token-mean")
        loss.backward()
        optimizer.step()
        model.zero_grad()
        return loss.detach()

    @contextmanager
    def patched():
        with ours.patched(), mock.patch.dict(chosen, loss="rk_vanilla"):
            yield

    return Step(run=run, contexts={"ours": patched, "verl": nullcontext}, model=model)


@contextmanager
def stubs():
    """Empty modules in the place of deepspeed and flash-attn, which OpenRLHF's modules import."""
    sys.path.append(str(STUBS))
    try:
        yield
    finally:
        sys.path.remove(str(STUBS))


def openrlhf_actor(case: dict) -> Step:
    """OpenRLHF's Actor, PolicyLoss and entropy bonus, as its PPO actor calls them; bf16 weights for bf16."""
    with stubs():
        from openrlhf.models import loss as losses
        from openrlhf.models.actor import Actor

    from rlhf_kernels.integrations import openrlhf as ours

    batch = _rollout(case["sizes"])
    model = language_model(case["sizes"]).to(cases.DTYPES[case["dtype"]])
    actor, policy_loss, optimizer = Actor(model), losses.PolicyLoss(), optimizer_of(model)
    actor.packing_samples = False  # which it sets only where it loads the model itself
    mask = batch["mask"].float()

    def run():
        log_probs, output = actor(
            batch["ids"], mask, attention_mask=batch["attention"], return_output=True, return_entropy=True
        )
        loss = policy_loss(log_probs, batch["old"], batch["advantages"], action_mask=mask)[0]
        loss = loss - 0.01 * losses.aggregate_loss(output.entropy[:, -mask.shape[1] :], mask)
        loss.backward()
        optimizer.step()
        model.zero_grad()
        return loss.detach()

    return Step(run=run, contexts={"ours": ours.patched, "openrlhf": nullcontext}, model=model)


def _trajectories(sizes: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards, values, mask) [B, T] as fp32, rows of different lengths."""
    torch.manual_seed(0)
    lengths = torch.randint(sizes["T"] // 4, sizes["T"] + 1, (sizes["B"], 1))
    mask = (torch.arange(sizes["T"]) < lengths).float()
    return tuple(x.to(DEVICE) for x in (torch.randn(mask.shape) * mask, torch.randn(mask.shape) * mask, mask))


def verl_gae(case: dict) -> Step:
    """verl's `compute_gae_advantage_return`, which whitens, as its driver calls it."""
    from verl.trainer.ppo import core_algos

    from rlhf_kernels.integrations import verl as ours

    rewards, values, mask = _trajectories(case["sizes"])

    def run():
        return core_algos.compute_gae_advantage_return(rewards, values, mask, 0.99, 0.95)

    return Step(run=run, contexts={"ours": ours.patched, "verl": nullcontext})


def openrlhf_gae(case: dict) -> Step:
    """OpenRLHF's `get_advantages_and_returns`."""
    absent = ("vllm", "openrlhf.trainer.ray", "openrlhf.trainer.ray.launcher")  # which this method does not use
    absent = [name for name in absent if name not in sys.modules]
    sys.modules.update({name: mock.MagicMock() for name in absent})
    with stubs():
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    for name in absent:
        del sys.modules[name]

    from rlhf_kernels.integrations import openrlhf as ours

    rewards, values, mask = _trajectories(case["sizes"])

    def run():
        return RemoteExperienceMaker.get_advantages_and_returns(None, values, rewards, mask, 0.99, 0.95)

    return Step(run=run, contexts={"ours": ours.patched, "openrlhf": nullcontext})


STEPS = {
    **{f"trl_{kind}": partial(trl_step, kind) for kind in ("sft", "dpo", "kto", "grpo", "rloo")},
    "trl_head": trl_head, "verl_actor": verl_actor, "verl_gae": verl_gae, "openrlhf_actor": openrlhf_actor,
    "openrlhf_gae": openrlhf_gae,
}  # fmt: skip


def main() -> None:
    """Answer the parent's lines; a failure is an answer too: {"failed": why}. What a trainer prints goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    case = step = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if asked["case"] != case:
                case = step = None  # the former step's memory goes before the next one's comes
                step, case = STEPS[asked["case"]["function"]](asked["case"]), asked["case"]
            timed = Timed(step, asked["impl"])
            answer = timed.first() if asked["what"] == "first" else timed.turn()
        except Exception as failure:
            answer = {"failed": f"{type(failure).__name__}: {failure}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
