"""What PPO costs on many GPUs, by formula: bytes a GPU and seconds an iteration. Estimates; nothing here was measured.

    python -m benchmarks.scale            # the tables of docs/scale.md
    python -m benchmarks.scale --write    # into the page

Bytes of weights, gradients and moments are exact (`benchmarks/scale_run.py` counts them in a run); activations are
those that autograd keeps of a Llama block on a CPU; seconds stand on the shares of the data sheet in `Machine`.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
BEGIN, END = "<!-- scale:begin -->", "<!-- scale:end -->"
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A Llama: gated MLP, grouped keys, no biases."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def block(self) -> int:
        """Weights of a transformer block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.hidden * (2 * q + 2 * kv) + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def head(self) -> int:
        """Weights of embedding or language-model head."""
        return self.vocab * self.hidden

    @property
    def trunk(self) -> int:
        return self.head + self.layers * self.block + self.hidden

    @property
    def policy(self) -> int:
        return self.trunk + (0 if self.tied else self.head)

    @property
    def scalar(self) -> int:
        """Weights of a reward model or value network: the trunk under a head of one row."""
        return self.trunk + self.hidden

    def adapters(self, rank: int) -> int:
        """LoRA on q_proj and v_proj, which is peft's choice for Llama."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.layers * rank * (2 * self.hidden + q + kv)

    def kv_bytes(self, entry: int = 2) -> int:
        """Keys and values of a token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * entry


LLAMA_1B = Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, 128256, tied=True)
LLAMA_8B = Shape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256, tied=False)
LLAMA_70B = Shape("Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128, 128256, tied=False)
SHAPES = (LLAMA_1B, LLAMA_8B, LLAMA_70B)
SMALL = Shape("135M", 576, 1536, 30, 9, 3, 64, 49152, tied=True)  # SmolLM-135M's
DEMO = Shape("demo", 192, 512, 5, 6, 6, 32, 2048, tied=True)


@dataclass(frozen=True)
class Layout:
    """How a run holds its networks: bytes of a number, and what trains."""

    name: str
    entry: int  # of weights, gradients, each of AdamW's two moments, and activations: --dtype
    adapter_rank: int = 0  # 0 = all weights train
    adapter_entry: int = 4  # peft keeps adapters in fp32


FLOAT32, BFLOAT16 = Layout("float32", 4), Layout("bfloat16", 2)
LORA = Layout("bfloat16, LoRA 16", 2, adapter_rank=16)
LAYOUTS = (FLOAT32, BFLOAT16, LORA)


def states(shape: Shape, layout: Layout) -> dict[str, int]:
    """Bytes of all four networks on all processes together, between the backward and the end of an optimizer step.

    With LoRA the reference is the policy without its adapters, and the value network's scalar head trains in full.
    """
    entry, rank = layout.entry, layout.adapter_rank
    if not rank:
        trained = shape.policy + shape.scalar
        frozen = shape.policy + shape.scalar
        return {"weights": entry * (trained + frozen), "gradients": entry * trained, "moments": 2 * entry * trained}
    trained = 2 * shape.adapters(rank) * layout.adapter_entry
    # the value network's head: peft copies it (modules_to_save), and trains the copy in the weights' type
    head = shape.hidden * entry
    frozen = (shape.policy + 2 * shape.scalar) * entry
    return {"weights": frozen + trained + head, "gradients": trained + head, "moments": 2 * (trained + head)}


def activations(shape: Shape, tokens: int, length: int, entry: int, *, checkpointing: bool = False) -> int:
    """Bytes that autograd keeps of the blocks of one network for the backward, rows padded to `length`.

    A block keeps of a token: the fp32 input of each norm, the two results and the root of each; queries, keys and
    values (repeated for all heads), the attention's output, its log-sum-exp and the mask; four rows of the MLP. With
    checkpointing each block keeps its input, and one block at a time all of it.
    """
    q = shape.heads * shape.head_dim
    norms = 2 * (4 * shape.hidden + 2 * entry * shape.hidden + 4)
    attention = 4 * entry * q + 4 * shape.heads + entry * length
    block = tokens * (norms + attention + 4 * entry * shape.intermediate)
    return shape.layers * tokens * entry * shape.hidden + block if checkpointing else shape.layers * block


def head_workspace(shape: Shape, labels: int, *, trained: bool = True) -> int:
    """Bytes of the log-probs from hidden states: a chunk of fp32 logits (docs/ops/linear.md), and the fp32 sum of d W.

    Without them the logits alone would be 4 * labels * vocab, and their gradient as much again.
    """
    rows = min(labels, 4096, max(2048, (5 << 29) // (4 * shape.vocab)))
    return 4 * shape.vocab * rows + (4 * shape.head if trained else 0)


@dataclass(frozen=True)
class Work:
    """An iteration: the paper's 512 responses and one epoch; lengths in tokens, rows of a forward on a GPU."""

    responses: int = 512
    prompt: int = 512
    response: int = 512
    rows: int = 4  # with gradient
    forward_rows: int = 64
    epochs: int = 1

    @property
    def length(self) -> int:
        return self.prompt + self.response


WORK = Work()


def per_gpu(shape: Shape, layout: Layout, gpus: int, rows: int, length: int, labels: int, **options) -> dict[str, int]:
    """Bytes on each GPU that trains, by what they are for, in the backward of `rows` rows.

    "whole" is what FSDP2 has gathered at once: the policy's embedding and head and the value network's embedding, two
    blocks, and the gradients of these and of one block.

    Args:
        length: tokens of a row; labels: those of its response.
        options: checkpointing, as in `activations`.
    """
    full, entry = not layout.adapter_rank, layout.entry
    found = {name: math.ceil(size / gpus) for name, size in states(shape, layout).items()}
    around = shape.policy + shape.scalar - 2 * shape.layers * shape.block
    whole = entry * (around + 2 * shape.block) + (entry * (around + shape.block) if full else 0)
    found["whole"] = whole if gpus > 1 else 0
    found["activations"] = 2 * activations(shape, rows * length, length, entry, **options)  # policy and value network
    found["head"] = head_workspace(shape, rows * labels, trained=full)
    return found


def handing_over(shape: Shape, layout: Layout, gpus: int) -> int:
    """Bytes on each GPU that trains while the policy is whole on each, to sample there, or to merge LoRA's adapters."""
    found = states(shape, layout)
    gathered = layout.entry * shape.policy if gpus > 1 else 0
    return math.ceil((found["weights"] + found["moments"]) / gpus) + gathered


def most_rows(shape: Shape, layout: Layout, gpus: int, work: Work = WORK, **options) -> int:
    """The largest `--per_device_train_batch_size` up to the GPU's share of the responses that fits; 0: not even 1."""
    rows = 0
    while rows < math.ceil(work.responses / gpus):
        found = per_gpu(shape, layout, gpus, rows + 1, work.length, work.response, **options)
        if sum(found.values()) > H200.room:
            break
        rows += 1
    return rows


@dataclass(frozen=True)
class Machine:
    """Of an H200, public figures; the shares of them that are assumed to be reached; links a GPU, one way."""

    memory: float = 141 * GB
    bandwidth: float = 4.8e12
    flops: float = 989e12  # dense bf16
    nvlink: float = 450 * GB  # inside of a machine of eight
    network: float = 50 * GB  # between machines: 400 Gbit/s, an assumption
    disk: float = 2 * GB  # of a file system that all share, an assumption
    compute_share: float = 0.4
    bandwidth_share: float = 0.6
    link_share: float = 0.8
    memory_share: float = 0.9

    @property
    def room(self) -> float:
        return self.memory_share * self.memory

    @property
    def reached_flops(self) -> float:
        return self.compute_share * self.flops

    @property
    def reached_bandwidth(self) -> float:
        return self.bandwidth_share * self.bandwidth

    def link(self, gpus: int) -> float:
        return self.link_share * (self.nvlink if gpus <= 8 else self.network)


H200 = Machine()


def sampler(shape: Shape, work: Work = WORK, entry: int = 2) -> dict:
    """A vLLM server: GPUs that share the weights (tensor parallel), and responses whose cache fits beside them."""
    weights, cache, room = entry * shape.policy, shape.kv_bytes(entry) * work.length, H200.room
    gpus = 1
    while gpus * room - weights < 64 * cache:
        gpus *= 2
    fits = int((gpus * room - weights) // cache)
    return {"weights": weights, "cache": cache, "gpus": gpus, "fits": fits}


def rollout_seconds(shape: Shape, gpus: int, work: Work = WORK) -> float:
    """Of `gpus` that sample: prompts by arithmetic; each step of a response by what it reads, or by arithmetic.

    A step reads the weights, and the cache of the responses that run, half of their tokens done.
    """
    server = sampler(shape, work)
    own = math.ceil(work.responses / (gpus // server["gpus"]))
    waves = math.ceil(own / server["fits"])
    running = math.ceil(own / waves)
    flops, reads = (server["gpus"] * rate for rate in (H200.reached_flops, H200.reached_bandwidth))
    context = work.prompt + work.response / 2
    read = (server["weights"] + running * context * shape.kv_bytes()) / reads
    step = max(read, forward_flops(shape, running, running) / flops)
    return forward_flops(shape, own * work.prompt, own) / flops + waves * work.response * step


def forward_flops(shape: Shape, tokens: int, labels: int = 0) -> int:
    """2 operations a weight and token: blocks at all tokens, the language model's head at those that are scored.

    The attention's products with the cache are left out: 4 * layers * heads * head_dim * keys a token, 2 % of the
    blocks' at 512 keys and 8B weights.
    """
    return 2 * (shape.layers * shape.block * tokens + shape.head * labels)


def seconds(shape: Shape, layout: Layout, gpus: int, rows: int, *, again: bool = False, work: Work = WORK) -> dict:
    """Of an iteration's phases, on `gpus` that train and as many that sample, products in bf16.

    Forward and backward are 3 forwards, or 2 where the weights are frozen (LoRA), and one more with checkpointing
    (`again`). Under FSDP2 the weights of each forward and backward come over the link, and gradients go back; that goes
    on beside the arithmetic, so the longer of the two counts. The servers get
    the weights as files, written and read; of LoRA the adapters alone.
    """
    link, local = H200.link(gpus), math.ceil(work.responses / gpus)
    tokens, labels = local * work.length, local * work.response

    def phase(flops: float, gathered: int, rows: int, scattered: int = 0) -> float:
        moved = 0.0 if gpus == 1 else math.ceil(local / rows) * (layout.entry * gathered + scattered) / link
        return max(flops / H200.reached_flops, moved)

    policy, scalar = forward_flops(shape, tokens, labels), forward_flops(shape, tokens)
    passes, gathers = (2 if layout.adapter_rank else 3) + again, 2 + again
    trained, gradients = shape.policy + shape.scalar, states(shape, layout)["gradients"]
    handed = layout.entry * shape.policy
    if layout.adapter_rank:
        handed = layout.adapter_entry * shape.adapters(layout.adapter_rank)
    return {
        "rollout": rollout_seconds(shape, gpus, work),
        "score": phase(scalar, shape.scalar, work.forward_rows),
        "evaluate": phase(2 * policy + scalar, 2 * shape.policy + shape.scalar, work.forward_rows),
        "update": work.epochs * phase(passes * (policy + scalar), gathers * trained, rows, gradients),
        "transfer": 2 * handed / H200.disk,
    }


COUNTS = (1, 8, 64)


def memory_table() -> list[str]:
    """A line a model and layout; on 1, 8 and 64 GPUs."""
    lines = [
        "| model | `--dtype` | GPUs | weights | gradients | moments | gathered | head | activations of a row: kept, "
        "checkpointed | with the policy whole | rows that fit: kept, checkpointed |",
        "|---" * 11 + "|",
    ]
    for shape in SHAPES:
        for layout in LAYOUTS:
            for gpus in COUNTS:
                found = per_gpu(shape, layout, gpus, 1, WORK.length, WORK.response)
                less = per_gpu(shape, layout, gpus, 1, WORK.length, WORK.response, checkpointing=True)
                cells = [gb(found[name]) for name in ("weights", "gradients", "moments", "whole", "head")]
                cells.append(f"{gb(found['activations'])}, {gb(less['activations'])}")
                whole = handing_over(shape, layout, gpus)
                cells.append(gb(whole) + (": no" if whole > H200.room else ""))
                fit = (most_rows(shape, layout, gpus, checkpointing=kept) for kept in (False, True))
                cells.append(", ".join(str(rows) if rows else "none" for rows in fit))
                lines.append(f"| {shape.name} | {layout.name} | {gpus} | {' | '.join(cells)} |")
    return lines


def sampler_table() -> list[str]:
    lines = [
        "| model | weights, bf16 | cache of a token | of a response | GPUs of a server | responses at once |",
        "|---" * 6 + "|",
    ]
    for shape in SHAPES:
        found = sampler(shape)
        cells = [gb(found["weights"]), f"{shape.kv_bytes() / 1e3:.0f} kB", gb(found["cache"])]
        lines.append(f"| {shape.name} | {' | '.join(cells)} | {found['gpus']} | {found['fits']} |")
    return lines


def time_table() -> list[str]:
    """With `Work.rows` rows where they fit; else with as many as fit, and with checkpointing.

    In brackets: LoRA's base, gathered whole so that the adapters are merged for the servers, does not fit.
    """
    names = ("rollout", "score", "evaluate", "update", "transfer")
    lines = [
        f"| model | `--dtype` | GPUs that train + sample | rows | {' | '.join(names)} | all |",
        "|---" * (len(names) + 5) + "|",
    ]
    for shape, layout, gpus in itertools.product(SHAPES, (BFLOAT16, LORA), COUNTS):
        for again in (False, True):
            rows = min(WORK.rows, most_rows(shape, layout, gpus, checkpointing=again))
            enough = again and most_rows(shape, layout, gpus) >= WORK.rows
            if rows and not enough and gpus >= sampler(shape)["gpus"]:
                found = seconds(shape, layout, gpus, rows, again=again)
                cells = [f"{rows}, checkpointed" if again else f"{rows}"]
                cells += [short(found[name]) for name in names] + [short(sum(found.values()))]
                fits = not layout.adapter_rank or handing_over(shape, layout, gpus) <= H200.room
                name = shape.name if fits else f"({shape.name})"
                lines.append(f"| {name} | {layout.name} | {gpus} + {gpus} | {' | '.join(cells)} |")
    return lines


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def gb(size: float) -> str:
    return "0" if size == 0 else f"{short(size / GB)} GB" if size >= 1e7 else f"{short(size / 1e6)} MB"


def block() -> str:
    """What stands between the two marks of docs/scale.md."""
    parts = ["### Memory of a GPU that trains", "", *memory_table(), "", "### Memory of a GPU that samples", ""]
    parts += [*sampler_table(), "", "### Seconds of an iteration", "", *time_table()]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    if parser.parse_args().write:
        from benchmarks.plot import replace_block

        replace_block(PAGE, BEGIN, END, block())
    print(block(), end="")


if __name__ == "__main__":
    main()
