"""The SFT stage: only responses are learned, every token weighs the same, packed rows equal padded rows."""

import copy
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers

from rlhf import data, models, training
from rlhf.rollouts import sampling
from rlhf.sft import SFTConfig, SFTTrainer, train_sft, up_to_stop
from tests.roundings import assert_same
from tests.tiny import WORDS, config_maker, language_model, model_folder, word_tokenizer, words, write_jsonl


def demonstrations(count, seed=0):
    generator = random.Random(seed)
    return [{"prompt": words(generator, 1, 12), "completion": words(generator, 1, 16)} for _ in range(count)]


@pytest.fixture
def settings(tmp_path):
    """settings(**changes) -> SFTConfig on a tiny policy and small demonstrations."""
    return config_maker(SFTConfig, tmp_path, demonstrations(40), sample_length=5)


def make_trainer(args, model=None, rows=None):
    args.eval_fraction = 0.0
    return SFTTrainer(model, args, train_dataset=rows, processing_class=args.model_name_or_path)


def expected_nll(model, examples):
    """Sum of -log p of the response tokens and their number, from whole logits in float64, one row at a time."""
    total, count = 0.0, 0
    model = copy.deepcopy(model).double()
    for example in examples:
        ids = example["prompt"] + example["responses"][0]
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(len(example["prompt"]), len(ids)):
            total -= log_probs[position - 1, ids[position]].item()
            count += 1
    return total, count


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_trap_24_loss_counts_the_responses_alone(settings, tmp_path, family, packing):
    """Packed = padded = rows alone in float64; the prompt adds nothing, EOS does."""
    path = model_folder(tmp_path / family, family=family)
    trainer = make_trainer(settings(packing=packing, model_name_or_path=path, dtype="float64"))
    examples = trainer.train_dataset[:6]
    total, count = expected_nll(trainer.model, examples)
    batch = trainer.collate(examples)
    assert trainer.count_items(batch) == count == sum(len(example["responses"][0]) for example in examples)
    assert_same(trainer.compute_loss(trainer.model, batch).item(), total / count)
    ends = batch["labels"][batch["cu_responses"][1:] - 1]
    assert (ends == trainer.tokenizer.eos_token_id).all()


def test_trap_24_packed_logits_equal_unpacked(settings):
    trainer = make_trainer(settings(dtype="float64"))
    examples = trainer.train_dataset[:6]
    found = []
    for packed in (False, True):
        batch = training.make_batch(examples, 0, packed=packed)
        names = ("input_ids", "attention_mask", "position_ids")
        logits = trainer.model(**{name: batch[name] for name in names}).logits.flatten(0, 1)
        found.append(logits[batch["label_rows"]])
    assert batch["input_ids"].shape[0] < len(examples)
    assert_same(found[0], found[1])


def constant_model(tokenizer, losses):
    """A GPT-2 that gives each named token the same -log p at every position, whatever comes before."""
    model = language_model(tokenizer, family="gpt2", n_positions=256, tie_word_embeddings=False)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.eye(16)[0])
        model.lm_head.weight.zero_()
        rest = 1 - sum(math.exp(-loss) for loss in losses.values())
        model.lm_head.weight[:, 0] = math.log(rest / (len(tokenizer) - len(losses)))
        for token, loss in losses.items():
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(token), 0] = -loss
    return model


@pytest.mark.parametrize(("batch", "steps"), [(2, 1), (1, 2)])
def test_trap_10_tokens_weigh_the_same(settings, batch, steps):
    """10 tokens of 1 nat and 200 of 3 nats: 610 / 210 = 2.90 however they are split; the mean of means says 2.0."""
    tokenizer = word_tokenizer()
    model = constant_model(tokenizer, {"a": 1.0, "b": 3.0})
    args = settings(
        per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1, max_length=256,
        eval_strategy="no", save_strategy="no",
    )  # fmt: skip
    trainer = make_trainer(args, model, [{"prompt": "c", "completion": "a", "at": "rows.jsonl:1"}])
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    row = {"prompt": "c"}
    trainer.train_dataset = [
        {"prompt": [5], "responses": [[a] * 10], "row": row},
        {"prompt": [5], "responses": [[b] * 200], "row": row},
    ]
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(610 / 210, abs=1e-3)


def test_trap_10_accumulation_equals_one_batch(settings, tmp_path):
    """Two optimizer steps with (batch 8, accumulation 1) and (1, 8): the same weights and losses."""
    found = []
    for batch, steps in ((8, 1), (1, 8)):
        args = settings(
            per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=2, optim="sgd",
            dtype="float64", output_dir=str(tmp_path / f"run-{batch}"), eval_strategy="no", save_strategy="no",
        )  # fmt: skip
        trainer = make_trainer(args)
        before = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
        trainer.train()
        after = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
        assert (after - before).abs().max() > 1e-3
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found.append(torch.cat([after, torch.tensor(losses)]))
    assert_same(found[0], found[1])


def test_training_learns_to_end(settings, tmp_path):
    """After training on `x -> y </s>` the model says it: greedy decoding gives the answer and stops."""
    rows = [{"prompt": f"{word} a", "completion": f"{word} {word}"} for word in WORDS[:12]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = train_sft(settings(dataset_name=path, num_train_epochs=60, eval_fraction=0.0, per_device_train_batch_size=12))
    model, tokenizer = models.load_policy(run), models.load_tokenizer(run)
    prompt = torch.tensor([data.encode_prompt(tokenizer, "d a")])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    assert tokenizer.convert_ids_to_tokens(out[0, 2:]) == ["d", "d", "</s>"]


def test_run_directory(settings):
    run = train_sft(settings(max_steps=4, eval_fraction=0.25, num_samples=3))
    summary = json.loads((run / "run.json").read_text())
    assert summary["stage"] == "sft" and summary["config"]["learning_rate"] == 1e-2
    assert math.exp(summary["summary"]["eval/loss"]) == pytest.approx(summary["summary"]["eval/perplexity"])
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 3 and set(samples[0]) == {"step", "prompt", "completion", "score"}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "loss" in row] == [1, 2, 3, 4]
    assert {"step", "time", "loss", "lr", "grad_norm"} <= set(metrics[0])
    assert list(run.glob("*.safetensors")) and not list(run.glob("*.bin"))


def test_samples_of_prompts_that_fill_the_context(settings, tmp_path):
    """Prompt and completion fit, the prompt and a sample do not: the sample's prompt is cut, the run goes on."""
    context = models.load_policy(settings().model_name_or_path).config.max_position_embeddings
    rows = [{"prompt": " ".join(WORDS[:1] * (context - 4)), "completion": WORDS[1]} for _ in range(2)]
    args = settings(
        eval_dataset_name=write_jsonl(tmp_path / "long.jsonl", rows), sample_length=context // 2 + 1, max_steps=1
    )
    samples = [json.loads(line) for line in (train_sft(args) / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in samples[:2]] == [row["prompt"] for row in rows]


def test_the_last_samples_wait_until_the_model_is_saved(settings, monkeypatch):
    """The first call is the try before training; the others are of steps 1, 2 and, behind the save, 3."""
    args, seen, real = settings(max_steps=3, eval_strategy="steps", eval_steps=1), [], sampling.sample
    saved = Path(args.output_dir) / "model.safetensors"
    monkeypatch.setattr(
        sampling,
        "sample",
        lambda *x, **options: seen.append((options["response_length"], saved.exists())) or real(*x, **options),
    )
    train_sft(args)
    assert seen == [(2, False), (5, False), (5, False), (5, True)]
    samples = [json.loads(line)["step"] for line in (Path(args.output_dir) / "samples.jsonl").read_text().splitlines()]
    assert samples == [1] * 4 + [2] * 4 + [3] * 4


def test_sampling_that_fails_costs_no_model(settings, monkeypatch, caplog):
    def fail(*args, **options):
        raise AttributeError("'StateCache' object has no attribute 'rows'")

    monkeypatch.setattr(sampling, "sample", fail)
    run = train_sft(settings(max_steps=1))
    assert (run / "model.safetensors").exists() and "eval/loss" in json.loads((run / "run.json").read_text())["summary"]
    told = [record.message for record in caplog.records if "num_samples" in record.message]
    assert len(told) == 2 and "sampling failed (AttributeError: 'StateCache' object" in told[0]


def test_a_text_that_gives_no_tokens_is_named(settings, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    args = settings(
        dataset_name=write_jsonl(tmp_path / "odd.jsonl", [{"text": "a b"}, {"text": "~"}]), eval_fraction=0.0
    )
    with pytest.raises(data.DataError, match=r"odd\.jsonl:2: the text gives no tokens$"):
        SFTTrainer(args=args, processing_class=tokenizer)


def test_held_out_loss_is_the_mean_over_tokens(settings):
    args = settings(max_steps=1, learning_rate=0.0, eval_fraction=0.25, per_device_eval_batch_size=3)
    run = train_sft(args)
    tokenizer = models.load_tokenizer(run)
    held_out = data.split_rows(data.load_rows(args.dataset_name, "sft"), 0.25, args.seed)[1]
    examples = training.encode_rows(tokenizer, held_out, ("completion",), args, what="held-out")
    total, count = expected_nll(models.load_policy(run), examples)
    loss = json.loads((run / "run.json").read_text())["summary"]["eval/loss"]
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_plain_text_rows(settings, tmp_path):
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": "the dog ran"}, {"text": "a b"}, *demonstrations(4)])
    trainer = make_trainer(settings(dataset_name=path))
    the, dog, ran = trainer.tokenizer.convert_tokens_to_ids(["the", "dog", "ran"])
    batch = trainer.collate(trainer.train_dataset[:1])
    assert batch["labels"].tolist() == [dog, ran, trainer.tokenizer.eos_token_id]
    assert trainer.train_dataset[0]["prompt"] == [the]
    train_sft(settings(dataset_name=path, max_steps=1))


def test_head_that_is_no_linear_map_uses_its_logits(settings):
    trainer = make_trainer(settings(packing="false"))
    batch = trainer.collate(trainer.train_dataset[:4])
    linear = trainer.compute_loss(trainer.model, batch)
    trainer.model.lm_head = torch.nn.Sequential(trainer.model.lm_head)  # no plain linear map any more
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), linear)
    total = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
    torch.testing.assert_close(total, linear * len(batch["labels"]))


def test_trap_17_dropout_in_sft_only_when_asked(settings):
    for dropout, equal in ((0.0, True), (0.2, False)):
        trainer = make_trainer(settings(dropout=dropout))
        trainer.model.train()
        batch = trainer.collate(trainer.train_dataset[:4])
        losses = [trainer.compute_loss(trainer.model, batch).item() for _ in range(2)]
        assert (losses[0] == losses[1]) is equal
    with pytest.raises(ValueError, match=r"dropout: got 1\.5"):
        settings(dropout=1.5)


def test_killed_run_goes_on_to_the_same_bits(settings, tmp_path):
    """With dropout and samples, so that every random number counts."""
    options = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "dropout": 0.2, "eval_steps": 2}
    whole = train_sft(settings(output_dir=str(tmp_path / "whole"), **options))
    stopped = tmp_path / "stopped"
    shutil.copytree(whole / "checkpoint-3", stopped / "checkpoint-3")
    for name in ("metrics.jsonl", "samples.jsonl"):
        shutil.copy(whole / name, stopped)
    train_sft(settings(output_dir=str(stopped), resume_from_checkpoint="true", **options))
    ours, theirs = models.load_policy(whole), models.load_policy(stopped)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert (whole / "samples.jsonl").read_text() == (stopped / "samples.jsonl").read_text()


def test_nothing_fits(settings):
    with pytest.raises(ValueError, match="max_length: got 2, too short for every completion"):
        train_sft(settings(max_length=2))
    with pytest.raises(ValueError, match="max_length: got 65, wants 2 to 64, the model's context"):
        train_sft(settings(max_length=65))


def test_peft_is_optional(settings, tmp_path):
    try:
        import peft  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"use_peft: the package peft is not installed \(pip install peft\)"):
            train_sft(settings(use_peft=True))
        return
    args = settings(use_peft=True, max_steps=2, lora_r=2)
    start = models.load_policy(args.model_name_or_path)
    run = train_sft(args)
    trained = models.load_policy(run)  # merged: a plain model
    changed = [not torch.equal(a, b) for a, b in zip(start.parameters(), trained.parameters(), strict=True)]
    assert any(changed) and not changed[0]
    assert not list(run.glob("adapter*"))
    torch.manual_seed(1)  # what was drawn before does not matter
    again = models.load_policy(
        train_sft(settings(use_peft=True, max_steps=2, lora_r=2, output_dir=str(tmp_path / "again")))
    )
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


def test_real_demonstrations(settings, shared_data, tmp_path):
    """Real demonstrations longer than the context of 512: cut on the left or dropped, counted, and learned."""
    run = train_sft(
        settings(
            model_name_or_path=str(shared_data / "stories260K-hf"),
            dataset_name=str(shared_data / "demonstrations.jsonl"),
            per_device_train_batch_size=2,
            eval_fraction=0.01,
            max_steps=2,
            learning_rate=1e-3,
        )
    )
    assert math.isfinite(json.loads((run / "run.json").read_text())["summary"]["eval/loss"])


@pytest.mark.parametrize("packing", ["true", "false"])
def test_several_answers_to_one_prompt(settings, packing):
    """They share the prompt, and cost what they cost in rows of their own."""
    prompt = "the dog ran up and down and"
    rows = [{"prompt": prompt, "completion": text, "at": "x:1"} for text in ("sat", "ran up the cat", "was good")]
    rows.insert(1, {"prompt": "a cat", "completion": "sat down", "at": "x:2"})
    trainer = make_trainer(settings(packing=packing), rows=rows)
    batch = trainer.collate(trainer.train_dataset)
    tokens = sum(len(ex["prompt"]) + len(ex["responses"][0]) for ex in trainer.train_dataset)
    shared = tokens - 2 * len(prompt.split())
    lengths = (batch["attention_mask"].shape[-1], batch["input_ids"].numel())
    assert lengths[1] <= 2 * (shared - 5) if packing == "true" else lengths[1] >= tokens
    nll, count = expected_nll(trainer.model, trainer.train_dataset)
    trainer.model.float()
    assert trainer.count_items(batch) == count
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(nll / count, rel=1e-5)
    texts = make_trainer(settings(packing=packing), rows=[{"text": "a b c", "at": "x:1"}, {"text": "a d", "at": "x:2"}])
    assert len(texts.collate(texts.train_dataset)["cu_groups"]) == 3  # plain texts share nothing


def test_samples_of_full_length_are_cut_at_their_end():
    assert up_to_stop([5, 2, 7, 2], [2, 9]) == [5, 2]
    assert up_to_stop([5, 7], [2]) == [5, 7]


def test_one_process_uses_one_gpu(settings, caplog):
    """transformers would split the batch over two GPUs, but not the labels, which a closure holds."""
    args = settings()
    args._n_gpu = 2
    trainer = make_trainer(args)
    assert trainer.args.n_gpu == 1 and trainer._wrap_model(trainer.model) is trainer.model
    assert trainer.args.train_batch_size == args.per_device_train_batch_size
    assert "uses 1 of 2 GPUs" in caplog.text
