"""Rankings and a reward trainer on a model of a few thousand parameters, for the tests of the reward stage."""

import random

import torch

from rlhf.reward import RewardConfig, RewardTrainer
from tests import tiny
from tests.tiny import words


def rankings(count, seed=0, sizes=(2, 4, 9)):
    """Rankings in which a completion is the better the more often it says `good`."""
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        completions = [words(generator, 1, 6) + " good" * level for level in range(sizes[index % len(sizes)])]
        generator.shuffle(completions)
        scores = [text.count("good") for text in completions]
        rows.append({"prompt": f"{words(generator, 1, 4)} a b c", "completions": completions, "scores": scores})
    return rows


def config_maker(folder, rows, **fixed):
    """make(**changes) -> RewardConfig on a tiny policy and the given rows."""
    return tiny.config_maker(RewardConfig, folder, rows, **fixed)


def make_trainer(args, rows=None, held_out=()):
    """A trainer of the reward stage on `rows`, or on all rows of the file of `args`."""
    args.eval_fraction = 0.0
    trainer = RewardTrainer(args=args, train_dataset=rows)
    trainer.held_out = list(held_out)
    return trainer


def gradient(trainer, batch, items):
    """All gradients of the loss of a batch that is part of `items` items, as one vector."""
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=items).backward()
    return torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()])
