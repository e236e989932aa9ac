"""Hugging Face Trainer: `Trainer(..., callbacks=[SetpointCallback(0.5)])`."""

from typing import Any

from transformers import TrainerCallback

from setpoint.cost.budget import Tolerance
from setpoint.integrations.checkpointing import enable_transformers
from setpoint.integrations.session import Session

_LOGGED = ("setpoint/budget_met", "setpoint/units", "setpoint/overhead_flops_ratio", "setpoint/cost_ratio/")


class SetpointCallback(Session, TrainerCallback):  # type: ignore[misc]
    """Prunes the model of a `Trainer` while it trains.

    Steps, inputs, accumulation and mixed precision are the Trainer's own. Its checkpoints carry sizes and the loop's
    state, so that `resume_from_checkpoint` continues and `load_best_model_at_end` works. The Trainer's logs hold under
    `setpoint/` how many units there are, what a step costs as a share of dense, the share of Setpoint's own work, and
    whether the budget is met; `log_to(callback.loop, ...)` logs all that the loop measures.

    Args:
        budget: as `attach` takes it: 0.5 is half of the dense model's FLOPs.
        best_within_budget: whether the Trainer's best checkpoint is the best of those within the budget; by default
            an earlier, larger one may be the best, which is warned of when it is loaded.
        settings: further arguments of `attach`, such as `teacher`, `controller`, `sensor` or `copies`. With a run
            budget, `total_steps` is the length of the dense run of which it is a share, by default `max_steps`: the
            Trainer stops when it is spent, so give it more.

    >>> callback = SetpointCallback(0.5)  # Trainer(model, args, train_dataset=data, callbacks=[callback])
    """

    def __init__(self, budget: Any = 0.5, *, best_within_budget: bool = False, **settings: Any) -> None:
        super().__init__(budget, **settings)
        if isinstance(self.goal, Tolerance):
            raise ValueError("a Tolerance needs the loss of each step, which a Trainer tells no callback: use a budget")
        self.best_within_budget, self._was_within = best_within_budget, True
        enable_transformers()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.prepare(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._was_within = True  # a run that goes on within its budget keeps its best checkpoint
        model = kwargs["model"] if self.trainer is None else self.trainer.model_wrapped
        self.begin(model, kwargs["optimizer"], total_steps=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        within = self.loop is not None and self.loop.budget_met
        if self.best_within_budget and within and not self._was_within:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._was_within = within
        if self.stepped():  # what the Trainer does at its own last step, too
            control.should_training_stop = True
            control.should_save |= args.save_strategy == "steps"
            control.should_evaluate |= args.eval_strategy == "steps" and args.eval_delay <= state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop:
            self.finish()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The best model is loaded next, without an event, and has other widths; only "epoch" saves in between.
        if control.should_training_stop and args.save_strategy != "epoch":
            self.finish()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            logs.update({name: value for name, value in self.metrics().items() if name.startswith(_LOGGED)})
            if state.log_history:
                state.log_history[-1].update(logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()
