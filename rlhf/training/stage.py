"""A run of a stage from its settings: data, tokenizer and lengths at the start, run.json and the model at the end."""

from pathlib import Path

from .. import checkpoint, data, models
from ..processes import check_processes
from .config import settings
from .trainer import MetricsFile

DEFAULT_CONTEXT = 1024


def load_data(args, kind):
    """(train, held-out) rows of the stage, all checked; the held-out side is empty if eval_fraction is 0."""
    options = {"config": args.dataset_config}
    rows = data.load_rows(args.dataset_name, kind, split=args.dataset_train_split, **options)
    if args.eval_dataset_name:
        return rows, data.load_rows(args.eval_dataset_name, kind, split=args.dataset_test_split, **options)
    return data.split_rows(rows, args.eval_fraction, args.seed)


def load_stage_tokenizer(args):
    return models.load_tokenizer(
        args.model_name_or_path,
        pad_token=args.pad_token,
        eos_token=args.eos_token,
        trust_remote_code=args.trust_remote_code,
    )


def model_options(args):
    names = ("dtype", "attn_implementation", "trust_remote_code")
    return {name: getattr(args, name) for name in names}


def context_length(model):
    """Tokens that the model can read at once, or None if its config does not say."""
    return next((getattr(model.config, name, None) for name in ("max_position_embeddings", "n_positions")), None)


def set_max_length(args, model):
    """Fill in max_length from the model's context, or check that it fits there."""
    context = context_length(model)
    if args.max_length is None:
        args.max_length = min(context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    elif args.max_length < 2 or (context and args.max_length > context):
        raise ValueError(f"max_length: got {args.max_length}, wants 2 to {context}, the model's context")
    return args.max_length


def run_stage(args, make_trainer, finish):
    """Prepare the run directory, train or go on training, finish, and write run.json and the final model.

    Args:
        make_trainer: callable(callbacks) -> StageTrainer.
        finish: callable(trainer) -> summary of the run for run.json; it may still change the model's config.
    Returns:
        Path of the run directory.
    """
    check_processes(args.world_size, args.distributed_state.distributed_type)
    last = checkpoint.resolve_checkpoint(args.output_dir, args.resume_from_checkpoint)
    output, step = Path(args.output_dir), None
    if args.process_index == 0:
        checkpoint.prepare_output_dir(output, resume=bool(args.resume_from_checkpoint))
        step = (int(last.name.rpartition("-")[2]) if last else 0) if args.resume_from_checkpoint else None
    trainer = make_trainer([MetricsFile(output, step)])
    trainer.samples = checkpoint.JsonLines(output / "samples.jsonl", resume_step=step)
    run = {"stage": args.stage, "config": settings(args), "summary": {}}
    if trainer.args.should_save:
        checkpoint.write_json(output / "run.json", run)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    run["summary"] = finish(trainer)
    model, state = trainer.whole_model()
    if trainer.args.should_save:
        models.save_model(model, trainer.tokenizer, output, state)
        checkpoint.write_json(output / "run.json", run)
    return output
