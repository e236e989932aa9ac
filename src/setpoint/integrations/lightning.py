"""Lightning: a callback that prunes what a Trainer trains.

Fabric needs none: `attach` takes what `fabric.setup` returns.

>>> callback = SetpointCallback(0.5)  # lightning.Trainer(max_epochs=10, callbacks=[callback])
>>> callback.budget, callback.summary
(0.5, None)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from setpoint.arguments import check_settings
from setpoint.attach import attach
from setpoint.checkpoint.resumable import resumable
from setpoint.cost.tolerance import Tolerance
from setpoint.errors import LoopError, NotBegunError
from setpoint.integrations.bill import SPENT, came_spent, has_bill, is_spent
from setpoint.loop.loop import Loop
from setpoint.loop.summary import Summary
from setpoint.messages import warn


def _package() -> Any:
    """Lightning under the one of its two names that the process uses, or that is installed."""
    names = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch_lightning"}
    for name in sorted(names, key=lambda name: name not in sys.modules):
        if find_spec(names[name]) is not None:
            return import_module(f"{name}.callbacks")
    raise ModuleNotFoundError("setpoint.integrations.lightning needs Lightning: pip install 'setpoint[lightning]'")


if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
else:
    Callback = _package().Callback


class SetpointCallback(Callback):  # type: ignore[misc]
    """Holds the model that a Trainer trains to a budget; the callback changes with each run.

    The whole `LightningModule` is attached to, with all of its optimizers. Setpoint follows what its `training_step`
    calls: the module itself, or parts of it. Averaged copies of `WeightAveraging` and `StochasticWeightAveraging` are
    cut alike. Checkpoints carry sizes and the state of the loop, so that `fit(ckpt_path=...)` goes on, and
    `test(ckpt_path="best")` finds the model as it was.

    Args:
        budget: as for `attach`.
        module: name of the part that is pruned, such as "generator"; by default all of it.
        total_steps: optimizer steps of the whole run; by default what the Trainer estimates. With a bill, steps of the
            dense run that a share of the bill is one of: the Trainer stops when the bill is spent, so give it more.
        monitor: a logged metric, such as "val_loss", that is reported to the loop with the training loss: for a
            `Tolerance`, and to have cuts taken back that the loss does not stand.
        settings: more arguments of `attach`.

    Raises:
        LoopError: when training begins, if the callback was given twice or the number of steps is not known; and what
            `attach` raises.
    """

    def __init__(
        self,
        budget: Any,
        *,
        module: str = "",
        total_steps: int | None = None,
        monitor: str | None = None,
        **settings: Any,
    ) -> None:
        check_settings(settings, SetpointCallback, attach)
        super().__init__()
        self.budget, self.module, self.total_steps, self.monitor = budget, module, total_steps, monitor
        self.settings = settings
        self.loop: Loop | None = None
        """The loop of the present run or the last one, None before."""

    @property
    def summary(self) -> Summary | None:
        """Summary of the last run; None before its end."""
        return self.loop.summary if self.loop is not None and "_summary" in vars(self.loop) else None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the model take the sizes of any checkpoint, also for a test without training."""
        if sum(isinstance(each, SetpointCallback) for each in trainer.callbacks) > 1:
            raise LoopError("SetpointCallback was given to the Trainer twice: give it once, with all budgets")
        for each in (pl_module, *_averages(trainer)):
            resumable(each)
        if self.loop is not None:  # of a run that an exception has ended
            self.loop.detach()
        # Last of all but ModelCheckpoint: WeightAveraging's `on_save_checkpoint` drops the sizes, and comes before.
        later = trainer.callbacks[trainer.callbacks.index(self) + 1 :]
        if any(hasattr(each, "_average_model") for each in later):
            others = [each for each in trainer.callbacks if each is not self]
            end = next((at for at, each in enumerate(others) if each in trainer.checkpoint_callbacks), len(others))
            trainer.callbacks = [*others[:end], self, *others[end:]]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach, when a checkpoint has been loaded already."""
        model, optimizers = trainer.strategy.model, list(trainer.optimizers)
        copies: list[nn.Module] = list(_averages(trainer))
        if self.module:
            model = pl_module.get_submodule(self.module)
            optimizers = [each for each in optimizers if _trains(each, model)]
            copies = [each.get_submodule(self.module) for each in copies]
        steps = self.total_steps or _total_steps(trainer)
        self.loop = attach(
            model,
            optimizers,
            self.budget,
            **{"total_steps": steps, "copies": copies, "resume": True, **self.settings},
        )
        if (trainer.min_steps or trainer.min_epochs) and has_bill(self.budget):
            name = "min_steps" if trainer.min_steps else "min_epochs"  # the Trainer adds min_epochs=1 to min_steps
            warn(
                f"the Trainer does not stop before {name}={getattr(trainer, name)}, even where the bill of the run is "
                f"spent before: leave {name} out"
            )
        if self.settings.get("resume", True) and came_spent(self.loop, optimizers[0]):
            warn(f"{SPENT}: the Trainer is told to stop")
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Finish where nothing is learnt any more: in the epoch that `StochasticWeightAveraging` adds."""
        if self.loop is not None and trainer.current_epoch >= _epochs(trainer) > 0 and self.summary is None:
            self.loop.finish()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Report the training loss, as it is before it is divided for accumulation."""
        if self.loop is not None and (self.monitor is not None or isinstance(self.budget, Tolerance)):
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self.loop.observe(loss=loss.detach() * parts)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop when the bill is spent, and log what the loop measures, as often as the Trainer logs."""
        if self.loop is not None and is_spent(self.loop):
            trainer.should_stop = True
        due = trainer.global_step and trainer.global_step % trainer.log_every_n_steps == 0
        if due and trainer.is_global_zero and self.loop is not None and (found := self.loop.metrics()):
            for logger in trainer.loggers:
                metrics = {f"setpoint/{name}": value for name, value in found.items()}
                logger.log_metrics(metrics, step=trainer.global_step)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the validation loss."""
        if self.monitor is not None and self.loop is not None and not trainer.sanity_checking:
            if self.monitor not in trainer.callback_metrics:
                known = ", ".join(sorted(trainer.callback_metrics)) or "none"
                raise LoopError(f"SetpointCallback(monitor={self.monitor!r}): no such metric was logged, but {known}")
            self.loop.observe(val=trainer.callback_metrics[self.monitor])

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the sizes back that `WeightAveraging` leaves out of the averaged weights."""
        if "current_model_state" in checkpoint:
            for each in _averages(trainer):
                state = each.state_dict()
                if state.keys() == checkpoint["state_dict"].keys():
                    checkpoint["state_dict"] = state

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish, after the last checkpoint, which holds the loop's state."""
        if self.loop is not None and self.summary is None:
            try:
                self.loop.finish()
            except NotBegunError:  # there was nothing left to train
                self.loop.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks away, unless a checkpoint is yet to be saved, which needs the loop's state."""
        saves = any(
            getattr(each, "save_on_exception", type(each).__name__ == "OnExceptionCheckpoint")
            for each in trainer.checkpoint_callbacks
        )
        if self.loop is not None and not saves:
            self.loop.detach()


def _averages(trainer: Any) -> Iterator[nn.Module]:
    """Averaged copies of the model that callbacks keep."""
    for each in trainer.callbacks:
        average = getattr(each, "_average_model", None)
        if isinstance(average, AveragedModel):
            average = average.module
        if isinstance(average, nn.Module):
            yield average


def _trains(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer has any parameter of a model."""
    parameters = set(map(id, model.parameters()))
    return any(id(each) in parameters for group in optimizer.param_groups for each in group["params"])


def _epochs(trainer: Any) -> int:
    """Epochs in which something is learnt, -1 for any number.

    For a model with batch norm, `StochasticWeightAveraging` adds one to those of the Trainer, with the optimizers at
    rest.
    """
    epochs = [each._max_epochs for each in trainer.callbacks if hasattr(each, "swa_end")]
    return int(min([trainer.max_epochs, *epochs]))


def _total_steps(trainer: Any) -> int:
    """Optimizer steps of a run, in each of which all optimizers step once."""
    steps, epochs = trainer.estimated_stepping_batches, _epochs(trainer)
    if 0 < epochs < trainer.max_epochs:
        steps = min(steps, epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
    if trainer.max_steps != -1:  # which counts the steps of each optimizer
        steps = min(steps, trainer.max_steps // max(1, len(trainer.optimizers)))
    if not 0 < steps < math.inf:
        raise LoopError(
            "the Trainer does not know how many optimizer steps it will make (its data has no length, and it has no "
            "max_steps): give SetpointCallback(..., total_steps=N), or Trainer(max_steps=N)"
        )
    return int(steps)
