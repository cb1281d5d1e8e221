"""Tokens of a response that are read and not learned: SFT and DPO leave them out of their sums, packed and padded.

Expected values are transformers' own loss in float64, with the label -100 where nothing is learned.
"""

import copy

import pytest
import torch

from rlhf.data.examples import Examples
from rlhf.preference import DPOConfig, DPOTrainer, pair_log_probs
from rlhf.sft import SFTConfig, SFTTrainer
from rlhf.training import make_batch
from tests.roundings import assert_same
from tests.tiny import model_folder

SOME = [
    {"prompt": [5, 6, 7], "responses": [[8, 9, 10, 11]], "learned": [[True, False, False, True]]},
    {"prompt": [5, 6, 7], "responses": [[12, 13]]},
    {"prompt": [9], "responses": [[4, 5, 6, 7, 8, 3]], "learned": [[False, False, True, True, False, True]]},
]
PAIRS = [
    {"prompt": [5, 6], "responses": [[8, 9, 10], [7, 7]], "learned": [[True, False, True], None]},
    {"prompt": [4, 5, 6, 7], "responses": [[3], [9, 8, 7, 6]], "learned": [None, [False, True, True, False]]},
]


def examples_of(dicts):
    return Examples.of([{**example, "row": {"prompt": "", "at": "x:1"}} for example in dicts])


def trainer_of(kind, tmp_path, packing, rows):
    stage, config = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}[kind]
    args = config(
        model_name_or_path=model_folder(tmp_path / "policy"), output_dir=str(tmp_path / "run"), use_cpu=True,
        disable_tqdm=True, dtype="float64", packing=packing, eval_fraction=0.0,
    )  # fmt: skip
    return stage(args=args, train_dataset=rows)


def losses(model, dicts):
    """transformers' summed loss and number of labels of every response, each in a row of its own."""
    model = copy.deepcopy(model).double()
    found = []
    for example in dicts:
        masks = example.get("learned") or [None] * len(example["responses"])
        for ids, mask in zip(example["responses"], masks, strict=True):
            learned = [token if known else -100 for token, known in zip(ids, mask or [True] * len(ids), strict=True)]
            labels = torch.tensor([[-100] * len(example["prompt"]) + learned])
            count = int((labels != -100).sum())
            mean = model(input_ids=torch.tensor([example["prompt"] + ids]), labels=labels).loss.item()
            found.append((mean * count, count))
    return found


@pytest.mark.parametrize("packing", ["true", "false"])
def test_sft_learns_only_learned_tokens(tmp_path, packing):
    """Two answers to one prompt meet, one of them with a mask; the mean is over the labels."""
    trainer = trainer_of("sft", tmp_path, packing, [{"prompt": "a", "completion": "b"}])
    examples = examples_of(SOME)
    batch = trainer.collate(examples[:])
    assert len(batch["cu_groups"]) == 3  # the answers to [5, 6, 7] share it
    assert batch["input_ids"].numel() < 3 * (3 + 6) or packing == "false"
    expected = losses(trainer.model, SOME)
    total, count = (sum(column) for column in zip(*expected, strict=True))
    assert trainer.count_items(batch) == count == 2 + 2 + 3
    assert_same(trainer.compute_loss(trainer.model, batch).item(), total / count)
    with torch.no_grad():
        assert_same(trainer.evaluate_rows(examples)["loss"], total / count)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_dpo_sums_only_learned_tokens(tmp_path, packing):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    trainer = trainer_of("dpo", tmp_path, packing, rows)
    log_probs, lengths = pair_log_probs(trainer.model, trainer.collate(examples_of(PAIRS)[:]))
    expected = losses(trainer.model, PAIRS)
    assert_same(log_probs.flatten(), [-total for total, _ in expected])
    assert lengths.flatten().tolist() == [2, 2, 1, 2]


@pytest.mark.parametrize("packed", [True, False])
def test_scores_are_read_at_the_last_token_whether_it_is_learned_or_not(packed):
    plain = [{name: example[name] for name in ("prompt", "responses")} for example in PAIRS]
    with_masks, without = (make_batch(rows, 0, packed=packed) for rows in (PAIRS, plain))
    assert with_masks["last_token_rows"].tolist() == without["last_token_rows"].tolist()
    assert with_masks["labels"].tolist() == [8, 10, 7, 7, 3, 8, 7]


def test_a_batch_without_masks_is_as_before():
    plain = [{"prompt": [5], "responses": [[6, 7], [8]]}, {"prompt": [9, 9], "responses": [[3]]}]
    everything = [{**row, "learned": [[True] * len(ids) for ids in row["responses"]]} for row in plain]
    for packed in (True, False):
        batch, masked = (make_batch(rows, 0, packed=packed) for rows in (plain, everything))
        assert set(batch) == set(masked) and all(torch.equal(batch[name], masked[name]) for name in batch)
