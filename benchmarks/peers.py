"""What other projects offer for the same work, as functions of our arguments; where one cannot run, why.

They are installed from benchmarks/requirements.txt and benchmarks/requirements-nodeps.txt, beside a torch that stays.
Every function here returns something to call, or a `Skip` with the reason.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cases import Skip

GPU = {
    "liger": Skip("Liger's kernels are Triton, which needs a GPU"),
    "cce": Skip("cut-cross-entropy's kernels are Triton, which needs a GPU"),
    "verl": Skip("verl's linear_cross_entropy is Triton, which needs a GPU"),
}


def _imported(load: Callable) -> Callable:
    """load(), once; a missing or unloadable package becomes the reason."""

    @functools.cache
    def found():
        try:
            return load()
        except ImportError as error:
            return Skip(f"cannot be imported: {str(error).splitlines()[0]}")

    return found


@_imported
def trl_logprobs():
    """TRL's selective_log_softmax."""
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


@_imported
def trl_logprobs_and_entropy():
    """TRL's selective_log_softmax_and_entropy."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


@_imported
def trl_entropy():
    """TRL's entropy_from_logits."""
    from trl.trainer.utils import entropy_from_logits

    return lambda logits, labels: entropy_from_logits(logits)


@_imported
def verl_logprobs():
    """verl's logprobs_from_logits, which without flash-attn is a loop over rows."""
    from verl.utils.torch_functional import logprobs_from_logits

    return logprobs_from_logits


@_imported
def verl_logprobs_and_entropy():
    """verl's two functions, one after the other."""
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    return lambda logits, labels: (logprobs_from_logits(logits, labels), entropy_from_logits(logits))


@_imported
def trl_linear_logprobs():
    """TRL's chunked log-probs from hidden states, with the chunk that its trainers use; log-probs alone."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def run(hidden, weight, labels):
        return ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )[0]

    return run


@_imported
def trl_linear_kl():
    """TRL's chunked divergence; beta = 1 is KL(student || teacher). It computes the student's entropy as well."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run(hidden, weight, ref_hidden, ref_weight):
        return ChunkedDivergenceFunction.apply(hidden, weight, None, ref_hidden, ref_weight, None, 1.0)[0]

    return run


@_imported
def verl_gae():
    """verl's compute_gae_advantage_return; it whitens the advantages too, so only its returns are compared."""
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    def run(rewards, values, mask, gamma, lam):
        return None, compute_gae_advantage_return(rewards, values, mask, gamma, lam)[1]

    return run


@_imported
def openrlhf_gae():
    """OpenRLHF's get_advantages_and_returns.

    Its module imports flash-attn and deepspeed, which do not install here, and the method uses neither: only its text
    is taken from the installed file.
    """
    spec = importlib.util.find_spec("openrlhf")
    if spec is None:
        raise ImportError("No module named 'openrlhf'")
    file = Path(spec.submodule_search_locations[0]) / "trainer" / "ppo_utils" / "experience_maker.py"
    name = "get_advantages_and_returns"
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if getattr(node, "name", None) == name]
    if not nodes:
        raise ImportError(f"{name} is not in {file.name} any more")
    names = {"torch": torch, "Tuple": tuple}
    exec(compile(ast.Module(body=[nodes[0]], type_ignores=[]), str(file), "exec"), names)
    return lambda rewards, values, mask, gamma, lam: names[name](None, values, rewards, mask, gamma, lam)


@_imported
def torchrl_gae():
    """torchrl's vectorised GAE; rewards and values are 0 under the mask, so every row is one episode of T steps."""
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def run(rewards, values, mask, gamma, lam):
        next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
        done = torch.zeros_like(mask)
        done[:, -1] = True
        columns = [x[..., None] for x in (values, next_values, rewards, done)]
        return tuple(x[..., 0] for x in vec_generalized_advantage_estimate(gamma, lam, *columns))

    return run


@_imported
def verl_ppo():
    """verl's policy and value loss with their metrics."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla, compute_value_loss

    def run(log_probs, old_log_probs, advantages, mask, values, old_values, returns):
        clip = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "global_batch_info": {}}
        config = OmegaConf.create(clip)
        policy = compute_policy_loss_vanilla(old_log_probs, log_probs, advantages, mask, config=config)[0]
        return policy + 0.1 * compute_value_loss(values, returns, old_values, mask, 0.2)[0]

    return run


@_imported
def trl_reward_trainer():
    """TRL's RewardTrainer on the pairs of one ranking: its collator, its loss and its backward, without an optimizer.

    make(model, chosen, rejected, pairs) -> step() -> the scores of the chosen and of the rejected texts, [N] each; a
    step accumulates the gradients of all pairs, `pairs` of them at a time. fp32, nothing checkpointed, nothing cut.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import RewardConfig, RewardTrainer

    def make(model, chosen, rejected, pairs):
        words = {str(token): token for token in range(model.config.vocab_size)}
        backend = Tokenizer(models.WordLevel(words, unk_token="0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", eos_token="0")
        folder = tempfile.TemporaryDirectory()
        steps = len(chosen) // pairs
        config = RewardConfig(
            output_dir=folder.name, use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None,
            per_device_train_batch_size=pairs, gradient_accumulation_steps=steps, report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        rows = [{"chosen_ids": a, "rejected_ids": b} for a, b in zip(chosen, rejected)]
        trainer = RewardTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.current_gradient_accumulation_steps = steps
        found = []
        model.score.register_forward_hook(lambda module, inputs, output: found.append(output.detach()[:, -1, 0]))

        def step():
            found.clear()
            for start in range(0, len(rows), pairs):
                trainer.training_step(model, trainer.data_collator(rows[start : start + pairs]))
            return tuple(torch.cat(half) for half in zip(*(scores.chunk(2) for scores in found)))

        step.folder = folder
        return step

    return make
