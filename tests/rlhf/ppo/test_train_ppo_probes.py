"""PPO's start-up check tries the longest prompts: packing that fails there is not used, samples that differ stop it."""

import logging

import pytest
import torch

from rlhf import models
from rlhf.ppo.contract import ContractError, check_contract


def by_index(module, args, output):
    """From the third column on the index in the row counts, not the position."""
    return output + 0.5 * (torch.arange(output.shape[1])[:, None] - 2).clamp(min=0)


def shifted(module, args, output):
    return output * 1.01 if module.training else output


def test_what_differs_on_real_prompts(home, caplog):
    trainer = home.trainer(num_responses=4, rollout_batch_size=8)
    assert trainer.contract["sampling"] < 1e-4 and trainer.contract["eval_mode"] == 0
    assert trainer.contract["packing"] < 1e-4 and trainer.share_width == 16
    layer = models.unwrapped(trainer.policy).model.layers[0].mlp
    handle = layer.register_forward_hook(by_index)
    with caplog.at_level(logging.WARNING, "rlhf"), pytest.raises(ContractError, match="sampling: samples come from an"):
        check_contract(trainer)
    assert trainer.share_width is None and "log-probs or values of packed rows and of rows alone" in caplog.text
    handle.remove()
    layer.register_forward_hook(shifted)
    with pytest.raises(ContractError, match="eval_mode: the policy computes something else in eval mode") as caught:
        check_contract(trainer)
    assert "\n" not in str(caught.value)
