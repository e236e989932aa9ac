"""Lightning: a callback that prunes what a Trainer trains. Fabric needs none: `attach` takes what it has set up."""

import math
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from setpoint.cost.budget import Tolerance
from setpoint.errors import LoopError
from setpoint.integrations.session import Session

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    from pytorch_lightning.callbacks import Callback  # the same package under its older name


class SetpointCallback(Session, Callback):  # type: ignore[misc]
    """Holds the model that a Trainer trains to a budget; the callback changes with each run.

    The whole `LightningModule` is attached to, with all of its optimizers. Setpoint follows what its `training_step`
    calls: the module itself, or parts of it. Averaged copies of `WeightAveraging` and `StochasticWeightAveraging` are
    cut with it. Checkpoints carry sizes and the state of the loop, so that `fit(ckpt_path=...)` continues, and
    `test(ckpt_path="best")` finds the model as it was.

    Args:
        budget: as for `attach`.
        module: name of the part that is pruned, such as "generator"; by default all of it.
        monitor: a logged metric, such as "val_loss", that is reported to the loop with the training loss: for a
            `Tolerance`, and to have cuts taken back that the loss does not stand.
        settings: more arguments of `attach`. `total_steps` is by default what the Trainer estimates; with a run budget,
            steps of the dense run of which it is a share: the Trainer stops when it is spent, so give it more.

    Raises:
        LoopError: when training begins, if the callback was given twice or the number of steps is not known; and what
            `attach` raises.

    >>> callback = SetpointCallback(0.5)  # lightning.Trainer(max_epochs=10, callbacks=[callback])
    """

    def __init__(self, budget: Any, *, module: str = "", monitor: str | None = None, **settings: Any) -> None:
        super().__init__(budget, **settings)
        self.module, self.monitor = module, monitor

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.prepare(pl_module, *_averages(trainer), callbacks=trainer.callbacks)
        # Behind all but ModelCheckpoint: WeightAveraging's `on_save_checkpoint` drops the sizes, and must come before.
        last = [self, *trainer.checkpoint_callbacks]
        trainer.callbacks = [callback for callback in trainer.callbacks if callback not in last] + last

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        model, optimizers, copies = trainer.strategy.model, list(trainer.optimizers), _averages(trainer)
        if self.module:
            model = pl_module.get_submodule(self.module)
            copies = [average.get_submodule(self.module) for average in copies]
            own = set(model.parameters())
            optimizers = [one for one in optimizers if any(own & set(group["params"]) for group in one.param_groups)]
        self.begin(model, optimizers, total_steps=_total_steps(trainer), copies=copies)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        # The epoch that `StochasticWeightAveraging` adds for batch norm: no optimizer steps in it.
        if trainer.current_epoch >= _epochs(trainer) > 0:
            self.finish()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if self.loop is not None and (self.monitor is not None or isinstance(self.goal, Tolerance)):
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self.loop.observe(loss=loss.detach() * parts)  # as it was before it was divided for accumulation

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.should_stop or self.stepped()
        due = trainer.global_step and trainer.global_step % trainer.log_every_n_steps == 0
        if due and trainer.is_global_zero and (metrics := self.metrics()):
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.monitor is not None and self.loop is not None and not trainer.sanity_checking:
            if self.monitor not in trainer.callback_metrics:
                known = ", ".join(sorted(trainer.callback_metrics)) or "none"
                raise LoopError(f"SetpointCallback(monitor={self.monitor!r}): no such metric was logged, but {known}")
            self.loop.observe(val=trainer.callback_metrics[self.monitor])

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if "current_model_state" in checkpoint:  # `WeightAveraging` has left the sizes out of the averaged weights
            for state in (average.state_dict() for average in _averages(trainer)):
                if state.keys() == checkpoint["state_dict"].keys():
                    checkpoint["state_dict"] = state

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        for saver in trainer.checkpoint_callbacks:  # a checkpoint that is yet to be saved needs the loop's state
            if getattr(saver, "save_on_exception", type(saver).__name__ == "OnExceptionCheckpoint"):
                return
        self.stop()


def _averages(trainer: Any) -> list[nn.Module]:
    kept = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [each.module if isinstance(each, AveragedModel) else each for each in kept if each is not None]


def _epochs(trainer: Any) -> int:
    """Epochs in which something is learnt, -1 for any number: `StochasticWeightAveraging` may add one to them."""
    return int(min([trainer.max_epochs, *(c._max_epochs for c in trainer.callbacks if hasattr(c, "swa_end"))]))


def _total_steps(trainer: Any) -> int | None:
    """Optimizer steps of a run, in each of which all optimizers step once; None where the Trainer does not know."""
    steps, epochs = trainer.estimated_stepping_batches, _epochs(trainer)
    if 0 < epochs < trainer.max_epochs:
        steps = min(steps, epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
    if trainer.max_steps != -1:  # which counts the steps of each optimizer
        steps = min(steps, trainer.max_steps // max(1, len(trainer.optimizers)))
    return int(steps) if 0 < steps < math.inf else None
