"""The networks of a PPO run: policy, reference, reward model and value network, from paths or as they are given."""

import copy
import dataclasses
import itertools
from pathlib import Path

import torch

from .. import models
from ..models.adapters import AdaptersOff, add_adapters, load_adapters
from ..rewards.scoring import own_tokens
from ..rewards.server import reward_server
from ..rollouts.sampling import warn_ignored_sampling_settings
from ..same_run import weights_digest
from .config import PPOConfig
from .prompts import fit_prompts
from .sharding import unseen
from .shards import holds_shards

PATHS = {"model": "sft_model_path", "reward_model": "reward_model_path", "value_model": "value_model_path"}


@dataclasses.dataclass
class Given:
    """What a caller in Python gave in place of settings: models, or paths of them, and a tokenizer."""

    processing_class: object = None
    model: object = None
    ref_model: object = None
    reward_model: object = None
    value_model: object = None
    peft_config: object = None

    def settings(self, args: PPOConfig) -> PPOConfig:
        """The settings with the paths that were given in them; from then on only models are left here.

        Raises:
            ValueError: names the argument that cannot be used.
        """
        if not isinstance(args, PPOConfig):
            raise ValueError(f"args: got {type(args).__name__}, wants PPOConfig")
        changes = {}
        for name, setting in PATHS.items():
            if isinstance(getattr(self, name), (str, Path)):
                changes[setting] = str(getattr(self, name))
                setattr(self, name, None)
        if self.peft_config is not None:
            changes["use_peft"] = True
        for name in ("model", "ref_model", "reward_model", "value_model"):
            if hasattr(getattr(self, name), "get_base_model"):
                raise ValueError(
                    f"{name}: got a PEFT model, wants one without adapters: merge them (model.merge_and_unload()), "
                    "and give peft_config for new ones"
                )
        args = dataclasses.replace(args, **changes)
        if self.value_model is not None and args.advantage != "gae":
            raise ValueError(f"value_model: got a model, want None with advantage {args.advantage}: it has no values")
        if self.ref_model is not None and self.ref_model is self.model:
            raise ValueError("ref_model: got the policy itself, wants another model, or None for a copy of the policy")
        if self.ref_model is not None and args.use_peft:
            raise ValueError("ref_model: got a model, wants None with use_peft: it is the policy with its adapters off")
        if self.reward_model is not None and args.reward_tokenizer != "same":
            raise ValueError(
                f"reward_tokenizer: got {args.reward_tokenizer!r} with a reward_model that is no path, wants 'same'"
            )
        return args

    def names(self) -> dict[str, str]:
        """What run.json says in place of the paths of models that were given."""
        return {
            setting: getattr(self, name).config._name_or_path or type(getattr(self, name)).__name__
            for name, setting in PATHS.items()
            if getattr(self, name) is not None
        }

    def tokenizer(self, args: PPOConfig):
        """The tokenizer that was given, or that of the policy's folder."""
        tokens = {"pad_token": args.pad_token, "eos_token": args.eos_token, "chat_template": args.chat_template}
        if self.processing_class is not None and not isinstance(self.processing_class, (str, Path)):
            return models.with_tokens(self.processing_class, "processing_class", **tokens)
        path = self.processing_class or getattr(getattr(self.model, "config", None), "_name_or_path", None)
        return models.load_tokenizer(path or args.sft_model_path, trust_remote_code=args.trust_remote_code, **tokens)


@unseen("FSDP_CPU_RAM_EFFICIENT_LOADING")  # with it, other libraries leave all processes but one without weights
def load_networks(run, resume: Path | None) -> None:
    """Fill in policy, reference, reward_model and value of the run, its stop tokens, and how prompts are shared.

    The numbers are those of the list in `rlhf/ppo/trainer.py`.

    Args:
        resume: checkpoint that policy and value network come from, or None.
    """
    args, given = run.args, run.given
    options = {
        "dtype": getattr(torch, args.dtype), "attn_implementation": args.attn_implementation,
        "trust_remote_code": args.trust_remote_code, "cut": _cut(run),
    }  # fmt: skip
    resume = None if holds_shards(resume) else resume  # the slices are read when all else is there
    whole = None if args.use_peft else resume
    _make_room(run, model=given.model, ref_model=given.ref_model, value_model=given.value_model)
    run.reference = None if args.use_peft else _reference(args, given, options)
    run.policy = _policy(args, given, options, whole)
    _make_room(run, policy=run.policy, reference=run.reference)
    run.reward_model = given.reward_model
    if run.reward_model is not None:
        run.reward_model = models.as_reward_model(run.reward_model)
    elif args.reward_model_path is not None and args.reward_server is None:
        run.reward_model = models.load_reward_model(args.reward_model_path, **options)
    for frozen in (run.reference, run.reward_model):
        if frozen is not None:
            frozen.requires_grad_(False).eval()
    run.reward_server = reward_server(run)
    run.own_tokens = own_tokens(run)  # 15
    run.value = _value(run, options, whole)
    _make_room(run, value_network=run.value)
    warn_ignored_sampling_settings(run.policy)  # 1
    extra = [token for token in (args.stop_token, args.stop_token_id) if token not in (None, "eos")]
    run.stop_ids = models.stop_token_ids(run.tokenizer, run.policy, extra)  # 3
    fit_prompts(run, _readers(run))
    _check_texts(run)
    _check_token_ids(run)
    for model in (run.reference, run.reward_model) if run.sharding.mesh is None else ():
        if model is not None:
            model.to(run.accelerator.device)
    longest = max(run.prompts.lengths) + args.response_length
    networks = (run.policy, run.reference, run.value, None if run.own_tokens else run.reward_model)
    wanted = args.packing != "false" and args.num_responses > 1
    run.share_width = None  # 12
    if wanted and models.share_prompts(networks, longest):
        run.share_width = models.hidden_size(run.policy)
    fixed = {"sft_model_path": run.reference or run.policy, "reward_model_path": run.reward_model}
    run.weights = {name: weights_digest(model) for name, model in fixed.items() if model is not None}
    if args.use_peft:  # 17
        _put_adapters(run, resume)
    if args.gradient_checkpointing:
        _recompute(run.policy, run.value)
    own = (run.policy, None if args.use_peft else run.reference, run.value, run.reward_model)
    for model in own:
        if model is not None:
            run.sharding(model)  # 19


def _recompute(*networks) -> None:
    """Keep no activations of a transformer block but its input; the backward computes them again.

    Raises:
        ValueError: transformers does not know how in this model.
    """
    for network in filter(None, networks):
        inner = models.unwrapped(network)
        if not inner.supports_gradient_checkpointing:
            raise ValueError(f"gradient_checkpointing: got True, want False: a {type(inner).__name__} takes none")
        enable = getattr(inner, "activation_checkpointing_enable", None)  # transformers >= 5.24
        (enable or inner.gradient_checkpointing_enable)({"use_reentrant": False})


def _cut(run):
    """What cuts a network before its weights are read, so that each process reads its slices alone; None without."""
    if run.sharding.mesh is None or run.args.use_peft:
        return None  # adapters are tried, and put on, where the weights are whole

    def cut(model):
        if run.args.chat_template and models.tokens_without_room(model, run.tokenizer):
            raise models.NotSliced("its embeddings grow by the tokens of chat_template")
        run.sharding(model)

    return cut


def _make_room(run, **networks):
    """Room for the tokens that chat_template brought; the same rows in all of them."""
    for name, network in networks.items() if run.args.chat_template else ():
        if isinstance(network, torch.nn.Module):
            models.make_room(network, run.tokenizer, run.args.seed, name, adapters=run.args.use_peft)


def _policy(args, given, options, whole):
    if given.model is None:
        return models.load_policy(whole or args.sft_model_path, **options)
    policy = models.as_policy(given.model)
    if whole is not None:
        policy.load_state_dict(models.load_policy(whole, **options).state_dict())
    return policy


def _reference(args, given, options):
    if given.ref_model is None and given.model is None:
        return models.load_policy(args.sft_model_path, **options)
    if isinstance(given.ref_model, (str, Path)):
        return models.load_policy(given.ref_model, **options)
    if given.ref_model is None:
        return models.as_policy(copy.deepcopy(given.model))
    return models.as_policy(given.ref_model, "ref_model")


def _value(run, options, whole):
    """The value network: what was given, else started from the reward model, else from the policy; None without one."""
    args, given = run.args, run.given  # 4
    if args.advantage != "gae":  # 21
        return None
    if given.value_model is not None:
        value = models.as_reward_model(given.value_model, "value_model")
        if whole is not None:
            value.load_state_dict(models.load_reward_model(whole / "value", **options).state_dict())
        return value
    if whole is not None:
        return models.load_reward_model(whole / "value", **options)
    if args.value_model_path is None and given.reward_model is not None:
        return copy.deepcopy(given.reward_model).requires_grad_(True).train()
    start = args.value_model_path or args.reward_model_path
    start = start or (given.model if given.model is not None else args.sft_model_path)
    if not isinstance(start, torch.nn.Module) and models.is_reward_model(start, args.trust_remote_code):
        return models.load_reward_model(start, **options)
    return models.reward_model_from_policy(start, args.seed, pad_token_id=run.tokenizer.pad_token_id, **options)


def _put_adapters(run, resume: Path | None) -> None:
    run.policy = add_adapters(run.args, run.policy, "CAUSAL_LM", run.given.peft_config)
    if run.value is not None:
        run.value = add_adapters(run.args, run.value, "SEQ_CLS")
    if resume is not None:
        load_adapters(run.policy, resume)
        if run.value is not None:
            load_adapters(run.value, resume / "value")
    run.reference = AdaptersOff(run.policy)


def _readers(run):
    """The networks that read the policy's tokens, by name."""
    networks = {"policy": run.policy, "reference": run.reference, "value network": run.value}
    networks |= {} if run.own_tokens else {"reward model": run.reward_model}
    return {name: model for name, model in networks.items() if model is not None}


def _check_token_ids(run) -> None:
    """Each network embeds the prompts, and what the policy can say."""
    own = models.embedded_ids(run.policy)
    said = [token for token in run.tokenizer.get_vocab().values() if token < own]
    for name, model in _readers(run).items():
        ids = itertools.chain(said, run.prompts.tokens)
        models.check_token_ids(model, run.tokenizer, ids, name)


def _check_texts(run) -> None:
    context = models.context_length(run.policy)
    if context and run.texts and run.texts.longest > context:
        hint = models.context_hint(run.policy)
        raise ValueError(
            f"ptx_max_length: got {run.args.ptx_max_length}, wants at most {context}, the policy's context{hint}"
        )
