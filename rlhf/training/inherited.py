"""transformers.TrainingArguments in our stages: each of its settings works here, or is refused with the reason."""

import dataclasses

from ..ranges import SEED, above, at_least, listed, within

_DECAY = within(0, 1, open_high=True)
RANGES = {
    "warmup_steps": at_least(0), "weight_decay": at_least(0), "adam_beta1": _DECAY, "adam_beta2": _DECAY,
    "adam_epsilon": at_least(0), "label_smoothing_factor": within(0, 1), "neftune_noise_alpha": above(0),
    "torch_empty_cache_steps": at_least(1), "eval_delay": at_least(0), "eval_accumulation_steps": at_least(1),
    "data_seed": SEED, "dataloader_num_workers": at_least(0), "dataloader_prefetch_factor": at_least(1),
    "ddp_bucket_cap_mb": at_least(1), "ddp_timeout": at_least(1), "local_rank": at_least(0, also=(-1,)),
    "warmup_ratio": within(0, 1), "past_index": at_least(-1),
}  # fmt: skip
"""Ranges of its numbers, but for those that our stages define anew."""

_OWN_EVALUATION = "a stage evaluates all held-out rows itself, and keeps no predictions"
_HUB = "the run stays on this machine; upload its folder when it is done (hf upload)"
_LIGER = "the losses are those of rlhf_kernels; Liger's would not be called"
REFUSED = {
    "label_smoothing_factor": "the loss is the stage's, and smooths no labels (dpo has label_smoothing)",
    "average_tokens_across_devices": "the loss is always the mean over the items of all processes",
    "remove_unused_columns": "the batches are made here",
    "length_column_name": "rows are not drawn by their length",
    "prediction_loss_only": _OWN_EVALUATION,
    "eval_accumulation_steps": _OWN_EVALUATION,
    "eval_do_concat_batches": _OWN_EVALUATION,
    "eval_use_gather_object": _OWN_EVALUATION,
    "include_for_metrics": _OWN_EVALUATION,
    "batch_eval_metrics": _OWN_EVALUATION,
    "label_names": _OWN_EVALUATION,
    "bf16_full_eval": "an evaluation computes as the training does (dtype, bf16)",
    "fp16_full_eval": "an evaluation computes as the training does (dtype, fp16)",
    "include_num_input_tokens_seen": "packed batches share their prompts, so that their tokens count otherwise",
    "auto_find_batch_size": "a run that began anew with other batches could not be resumed; "
    "lower per_device_train_batch_size, and raise gradient_accumulation_steps",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "use_cache": "training needs no cache of keys and values, and sampling has its own",
    "parallelism_config": "the stages share their work by DDP, FSDP2 or DeepSpeed (docs/runs.md)",
    "save_only_model": "a checkpoint is there to be resumed from; save_total_limit bounds the disk",
    "enable_jit_checkpoint": "the command writes a checkpoint at SIGTERM by itself",
    "ignore_data_skip": "a resumed run would see other data",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "do_train": "a stage always trains",
    "do_predict": "a stage makes no predictions; rlhf best-of-n samples",
}
"""Settings that would have no effect, or a wrong one, when they differ from their defaults; and why."""

WORK = {
    "lr_scheduler_kwargs", "lr_scheduler_type", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "optim_target_modules", "bf16", "fp16", "tf32", "activation_checkpointing",
    "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "neftune_noise_alpha", "torch_empty_cache_steps", "logging_strategy", "logging_first_step", "log_on_each_node",
    "log_level", "log_level_replica", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "eval_delay", "eval_on_start", "save_strategy", "save_on_each_node",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "restore_callback_states_from_checkpoint",
    "full_determinism", "data_seed", "use_cpu", "accelerator_config", "dataloader_drop_last",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed",
    "debug", "skip_memory_metrics", "local_rank", "train_sampling_strategy", "do_eval",
    "torch_compile", "torch_compile_backend", "torch_compile_mode",
}  # fmt: skip
"""The others, but for those that our stages define anew: read by transformers' Trainer where a stage leaves it alone.
A test holds these tables against the installed TrainingArguments, so that what a new version adds is looked at."""


CHOICES = {"train_sampling_strategy": ("random", "sequential")}
"""Of these only some values work."""


def refuse_unused(args) -> None:
    """Raise ValueError for the first setting that would have no effect here and is not at its default."""
    for name, choices in CHOICES.items():
        if getattr(args, name, choices[0]) not in choices:
            raise ValueError(f"{name}: got {getattr(args, name)!r}, wants {listed(choices)}")
    for item in dataclasses.fields(args):
        if item.name in args.refused:
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            value = getattr(args, item.name)
            if value != default:
                raise ValueError(f"{item.name}: got {value!r}, wants {default!r}: {args.refused[item.name]}")
