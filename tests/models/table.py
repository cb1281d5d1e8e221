"""The table of docs/models.md: what this package does with every causal language model of the installed transformers.

    python -m tests.models.table [MODEL ...]     prints the rows of these models; without a name all, into the page

Each model runs in a process of its own, as many at a time as there are processors, and is given up after TIMEOUT.
"""

import multiprocessing
import os
import re
import sys
import time
import warnings
from multiprocessing.connection import wait

import torch
import transformers

from tests.models.checks import CLAIMS, ROOT, check
from tests.models.tiny_configs import families

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- make test-models: begin -->", "<!-- make test-models: end -->"
TIMEOUT = 600  # seconds, for a machine that is busy with much else
WORDS = {
    "ok": "yes",
    "refused": "refused",
    "transformers": "theirs",
    "WRONG": "WRONG",
    "CRASH": "CRASH",
    "not built": "-",
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 10,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip
VARIANTS = {  # of configs that people have, and that compute something else
    "bert, not a decoder": ("bert", {"is_decoder": False}),
    "deepseek_v3, yarn": ("deepseek_v3", {"rope_parameters": YARN}),
    "falcon, ALiBi": ("falcon", {"alibi": True}),
    "gemma3_text, both ways": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma4_text, experts": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    ),
    "gemma4_text, shared keys": (
        "gemma4_text",
        {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "inkling_text, padded vocabulary": ("inkling_text", {"unpadded_vocab_size": 98}),
    "llama, dynamic rope": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 10}),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "mixtral, output_router_logits": ("mixtral", {"output_router_logits": True}),
    "mixtral, router_jitter_noise": ("mixtral", {"router_jitter_noise": 0.1}),
    "opt, narrow embeddings": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 10}),
}


def answers(name):
    """{claim: answer} of a model type or a variant."""
    family, changes = VARIANTS.get(name, (name, {}))
    return check(family, **changes)


def _work(name, pipe):
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    pipe.send(answers(name))


def run(names, processes):
    """{name: its answers} of all names."""
    fork, waiting, running, found = multiprocessing.get_context("fork"), list(names), {}, {}
    while waiting or running:
        while waiting and len(running) < processes:
            name, (here, there) = waiting.pop(0), fork.Pipe(duplex=False)
            worker = fork.Process(target=_work, args=(name, there))
            worker.start()
            there.close()
            running[here] = (name, worker, time.monotonic() + TIMEOUT)
        ready = wait(running, timeout=1)
        for pipe in [pipe for pipe, (*_, end) in running.items() if pipe in ready or time.monotonic() > end]:
            name, worker, _ = running.pop(pipe)
            found[name] = _result(pipe, worker)
            print(f"{len(found)}/{len(names)} {name}", file=sys.stderr)
    return {name: found[name] for name in names}


def _result(pipe, worker):
    if not pipe.poll():
        worker.kill()
        return dict.fromkeys(CLAIMS, f"CRASH it took more than {TIMEOUT} seconds")
    try:
        return pipe.recv()
    except EOFError:
        worker.join()
        return dict.fromkeys(CLAIMS, f"CRASH the process ended with {worker.exitcode}")


def row(name, found):
    """A line of the table: a word for each claim, and the reasons behind those that are not "yes"."""
    words = [next(word for start, word in WORDS.items() if answer.startswith(start)) for answer in found.values()]
    reasons = {}
    for claim, answer in found.items():
        if answer != "ok":
            reasons.setdefault(_reason(answer), []).append(claim)
    notes = "; ".join(f"{_list(claims)}{reason}" for reason, claims in reasons.items())
    return "| " + " | ".join([name, *words, notes]) + " |"


def _list(claims):
    return "" if len(claims) == len(CLAIMS) else ", ".join(claims) + ": "


def _reason(answer):
    text = re.sub(r"^(refused: |transformers: |not built: |WRONG |CRASH )", "", answer)
    text = re.sub(r"\b\w+ cannot take packed responses: |'/tmp/\w+'|\bmodel '?/tmp/\S+ ", "", text)
    return text.replace("|", "\\|")[:200]


def table(results):
    head = ["", *CLAIMS, "why"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + [row(name, found) for name, found in results.items()])


def summary(results):
    """How many models get which answer to each claim."""
    count = {word: [0] * len(CLAIMS) for word in WORDS.values()}
    for found in results.values():
        for column, answer in enumerate(found.values()):
            count[next(word for start, word in WORDS.items() if answer.startswith(start))][column] += 1
    lines = ["| " + " | ".join(["", *CLAIMS]) + " |", "|" + "---|" * (len(CLAIMS) + 1)]
    return "\n".join(
        lines + [f"| {word} | " + " | ".join(map(str, each)) + " |" for word, each in count.items() if any(each)]
    )


def main(chosen):
    torch.set_num_threads(1)  # none of torch's threads may be there when processes fork
    names = [*families(), *VARIANTS]
    unknown = set(chosen) - set(names)
    if unknown:
        raise SystemExit(
            f"MODEL: got {', '.join(sorted(unknown))}, wants types of causal language models, as {names[:3]}"
        )
    wanted = [name for name in names if not chosen or VARIANTS.get(name, (name, {}))[0] in chosen or name in chosen]
    results = run(wanted, len(os.sched_getaffinity(0)))
    text = table(results)
    if chosen:
        print(text)
    else:
        text = f"{summary(results)}\n\n{text}"
        page = PAGE.read_text()
        before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
        PAGE.write_text(f"{before}\nWith transformers {transformers.__version__}:\n\n{text}\n{after}")
    broken = [name for name, found in results.items() if any(a.startswith(("WRONG", "CRASH")) for a in found.values())]
    return f"{len(broken)} of {len(results)} are wrong or crash: {', '.join(broken)}" if broken else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
