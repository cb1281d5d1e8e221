"""What a stage takes for granted of its model is tried on its longest rows: a model that breaks it stops the run."""

import logging

import pytest
import torch

from rlhf import models
from rlhf.preference import DPOConfig, DPOTrainer
from rlhf.reward import RewardConfig, RewardTrainer
from rlhf.sft import SFTConfig, SFTTrainer
from rlhf.training import probes
from tests.tiny import language_model, word_tokenizer

LONG = "the dog ran up and the cat sat down and"
ROWS = [{"prompt": prompt, "completion": "was good"} for prompt in (LONG, f"{LONG} the dog", "a b", "c", "d e f", "g")]
PAIRS = [{"prompt": row["prompt"], "chosen": "was good", "rejected": "was bad and up"} for row in ROWS]
RANKINGS = [{"prompt": row["prompt"], "completions": ["was good", "a b", "bad"], "ranks": [0, 1, 2]} for row in ROWS]
STAGES = {
    "sft": (SFTTrainer, SFTConfig, ROWS),
    "reward": (RewardTrainer, RewardConfig, RANKINGS),
    "dpo": (DPOTrainer, DPOConfig, PAIRS),
}


def noisy(module, args, output):
    return output + 0.01 * torch.randn_like(output) if module.training else output


def shifted(module, args, output):
    return output * 1.01 if module.training else output


def mixing(module, args, output):
    """Rows see each other."""
    return output + 0.1 * output.mean(dim=0, keepdim=True)


def by_index(module, args, output):
    """From the eighth column on the index in the row counts, not the position: no probe of a few tokens sees it."""
    return output + 0.05 * (torch.arange(output.shape[1])[:, None] - 7).clamp(min=0)


def model_with(hook):
    model = language_model(word_tokenizer())
    if hook is not None:
        model.model.layers[0].mlp.register_forward_hook(hook)
    return model


def trainer_of(stage, model, folder, **changes):
    kind, config, rows = STAGES[stage]
    if stage == "reward":
        hooks = model.model.layers[0].mlp._forward_hooks
        model = models.reward_model_from_policy(model, 0, pad_token_id=0)
        model.model.layers[0].mlp._forward_hooks.update(hooks)
    options = {"output_dir": str(folder / "run"), "use_cpu": True, "disable_tqdm": True, "max_steps": 1, "seed": 1}
    args = config(**options | changes)
    return kind(model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=word_tokenizer())


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_that_is_random_or_other_in_train_mode_is_refused(stage, tmp_path):
    name = "(Llama\\w+)"
    numbers = r"by [\d.e-]+ \(at most 1e-05 is rounding\); switch off in its config\.json"
    with pytest.raises(ValueError, match=rf"^train mode is random: the \S+ of {name} .* {numbers}"):
        trainer_of(stage, model_with(noisy), tmp_path)
    with pytest.raises(ValueError, match=rf"^train mode computes something else than eval mode: .* {numbers}"):
        trainer_of(stage, model_with(shifted), tmp_path)
    with pytest.raises(ValueError, match=r"^rows depend on each other: .*use --per_device_train_batch_size 1"):
        trainer_of(stage, model_with(mixing), tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_packing_that_fails_on_long_rows_only(stage, tmp_path, caplog):
    assert trainer_of(stage, model_with(None), tmp_path).can_pack
    with caplog.at_level(logging.WARNING, "rlhf"):
        assert not trainer_of(stage, model_with(by_index), tmp_path).can_pack
    told = [record.message for record in caplog.records if record.message.startswith("packing:")]
    assert len(told) == 1 and told[0].endswith("is rounding); rows are not packed")
    with pytest.raises(ValueError, match=r"^packing: the \S+ of Llama\w+ of packed rows .*; use --packing false$"):
        trainer_of(stage, model_with(by_index), tmp_path, packing="true")
    caplog.clear()
    assert not trainer_of(stage, model_with(by_index), tmp_path, packing="false").can_pack
    assert not [record for record in caplog.records if record.message.startswith("packing:")]


def test_samples_from_another_distribution(tmp_path):
    """A short prompt that is padded on the left stands where the index counts."""
    with pytest.raises(ValueError, match=r"^samples come from another distribution .*; use --num_samples 0$"):
        trainer_of("sft", model_with(by_index), tmp_path, packing="false")
    assert trainer_of("sft", model_with(by_index), tmp_path, packing="false", num_samples=0).args.num_samples == 0
    model = model_with(None).double().eval()
    prompts, tokens = [[5, 6], [7, 8, 9, 10, 11, 12]], [4, 3]
    found = probes.sampler_log_probs(model, prompts, tokens, temperature=0.7)
    for ids, token, log_prob in zip(prompts, tokens, found, strict=True):
        logits = model(torch.tensor([ids])).logits[0, -1] / 0.7
        assert log_prob.item() == pytest.approx(logits.log_softmax(-1)[token].item(), abs=1e-5)


def test_residual_dropout_is_measured_without_and_trained_with(tmp_path):
    trainer = trainer_of("sft", model_with(None), tmp_path, dropout=0.2)
    ids = torch.arange(3, 13)[None]
    model = trainer.model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert models.as_policy(model) is model and torch.equal(model(ids).logits, model(ids).logits)


def test_the_longest_rows_are_tried_and_few_of_them():
    rows = [{"prompt": [1] * n, "responses": [[2] * k for k in range(1, 6)], "row": {}} for n in (3, 9, 5, 7)]
    assert [(len(row["prompt"]), [len(ids) for ids in row["responses"]]) for row in probes.longest(rows)] == [
        (9, [3, 4, 5]),
        (7, [3, 4, 5]),
    ]


def test_trying_draws_nothing_from_the_run(tmp_path):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    model = model_with(None).train()
    rows = [{"prompt": [3, 4, 5], "responses": [[6, 7]], "row": {"prompt": ""}}]
    torch.random.set_rng_state(before)
    assert probes.try_model(model, rows, packing="auto", samples=True)
    assert torch.equal(before, torch.random.get_rng_state()) and model.training
    numbers = torch.tensor([1.0, 2.0, 5.0])
    assert probes.gap(numbers, torch.ones(3), torch.float32) == 4
    assert probes.gap(numbers, torch.ones(3), torch.bfloat16) == pytest.approx(5 / 3)
