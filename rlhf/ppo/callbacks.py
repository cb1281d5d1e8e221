"""Callbacks of a PPO run: plain functions, and transformers' TrainerCallbacks for those who have some."""

import inspect

from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler


class Flow(DefaultFlowCallback):
    """Takes the place of transformers' own, which decides by a Trainer's settings when to log, save and stop."""

    def on_step_end(self, args, state, control, **kwargs):
        return control

    on_epoch_end = on_step_end


class Callbacks:
    """What is told of a run: its start, each iteration (a step, in transformers' words), its saves and its end.

    A function is called as `callback(trainer, step, metrics)`; one that returns True ends the run. A TrainerCallback
    gets `on_train_begin`, `on_step_end`, `on_log`, `on_save` and `on_train_end` with the PPOConfig in the place of the
    TrainingArguments; `control.should_training_stop` ends the run.
    """

    def __init__(self, run, callbacks):
        self.run, self.functions, theirs = run, [], []
        for callback in callbacks or ():
            kind = callback if inspect.isclass(callback) else type(callback)
            (theirs if issubclass(kind, TrainerCallback) else self.functions).append(callback)
        wrong = next((callback for callback in self.functions if not callable(callback)), None)
        if wrong is not None:
            raise ValueError(f"callbacks: got {wrong!r}, wants functions or transformers.TrainerCallback objects")
        self.state, self.control = TrainerState(), TrainerControl()
        self.handler = (
            CallbackHandler([Flow, *theirs], run.policy, run.tokenizer, run.optimizer, run.scheduler)
            if theirs
            else None
        )

    def tell(self, event: str, **details) -> None:
        """Call `event` of all TrainerCallbacks."""
        if self.handler is None:
            return
        self.state.global_step, self.state.max_steps = self.run.step, self.run.iterations
        self.state.is_world_process_zero = self.state.is_local_process_zero = self.run.accelerator.is_main_process
        self.control = self.handler.call_event(event, self.run.args, self.state, self.control, **details)

    def iteration(self, metrics: dict[str, float]) -> bool:
        """Tell of an iteration; True where one of them ends the run."""
        self.state.log_history.append({**metrics, "step": self.run.step})
        self.tell("on_step_end")
        self.tell("on_log", logs=metrics)
        answers = [function(self.run, self.run.step, metrics) for function in self.functions]
        return self.control.should_training_stop or any(answer is True for answer in answers)
