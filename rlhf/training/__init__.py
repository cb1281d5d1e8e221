"""What the SFT, reward and preference stages share: settings, batches, a Trainer around transformers', and the run."""

from ..ranges import option
from .batches import batch_inputs, encode_rows, make_batch, response_log_probs
from .callbacks import MetricsFile, StageProgress
from .config import StageConfig, settings
from .stage import load_data, load_stage_tokenizer, model_options, set_max_length
from .trainer import StageTrainer, logger, may_pack

__all__ = [
    "MetricsFile",
    "StageConfig",
    "StageProgress",
    "StageTrainer",
    "batch_inputs",
    "encode_rows",
    "load_data",
    "load_stage_tokenizer",
    "logger",
    "make_batch",
    "may_pack",
    "model_options",
    "option",
    "response_log_probs",
    "set_max_length",
    "settings",
]
