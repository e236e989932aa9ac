"""Ultralytics: `pruning = add(YOLO("yolov8n.yaml"), 0.5)`, and the model's own `train` prunes."""

from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from torch import nn

from setpoint.actuator.model_shapes import was_cut
from setpoint.distributed import unwrapped
from setpoint.errors import LoopError
from setpoint.groups.sizes_in_code.shim import SizedForward
from setpoint.integrations.session import Session
from setpoint.ledger import Entry
from setpoint.loop.summary import Event


class Pruning(Session):
    """Prunes a model of ultralytics while its trainer trains it; the object changes with each run."""

    def on_pretrain_routine_start(self, trainer: Any) -> None:
        """Let the trainer take over cut weights: it would leave out every layer of another width, without a word."""
        plain = trainer.get_model

        @wraps(plain)
        def get_model(cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
            cut = isinstance(weights, nn.Module) and was_cut(weights)
            model: nn.Module = plain(cfg=cfg, weights=None if cut else weights, verbose=verbose)
            if cut:
                self.prepare(model, weights)
                model.load_state_dict(weights.float().state_dict())
            return model

        trainer.get_model = get_model

    def on_train_start(self, trainer: Any) -> None:
        rows = max(1, trainer.batch_size // max(1, trainer.world_size))
        shape = (rows, trainer.data.get("channels", 3), trainer.args.imgsz, trainer.args.imgsz)
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(trainer.device)
        self.begin(
            trainer.model,
            trainer.optimizer,
            total_steps=_total_steps(trainer),
            example=(images,),
            copies=[] if trainer.ema is None else [trainer.ema.ema],
            resume=bool(trainer.resume) or not was_cut(trainer.model),
        )
        assert self.loop is not None, "begin attaches"
        self.loop.on_step(partial(_renew, trainer))
        _renew(trainer)

    def on_train_end(self, trainer: Any) -> None:
        self.finish()

    def teardown(self, trainer: Any) -> None:
        """Take the hooks away, also where an exception has ended the run."""
        self.stop()


def add(model: Any, budget: Any, **settings: Any) -> Pruning:
    """Let a model of ultralytics prune itself to a budget whenever its `train` is called.

    The averaged copy is cut with the model, and the `*.pt` files hold the smaller model. A stopped run continues with
    `train(resume=True)` after `add` was called on `YOLO("last.pt")`.

    Args:
        model: such as `YOLO("yolov8n.pt")`.
        budget: as for `attach`.
        settings: more arguments of `attach`; `total_steps` is by default what the trainer's epochs come to.

    Returns:
        The object that holds the loop and the summary.

    Raises:
        LoopError: if pruning was added to the model before.
    """
    pruning = Pruning(budget, **settings)
    if any(isinstance(getattr(callback, "__self__", None), Pruning) for callback in model.callbacks["on_train_start"]):
        raise LoopError("this model is pruned already: give one budget, or several in one, to one call of add")
    for event in ("on_pretrain_routine_start", "on_train_start", "on_train_end", "teardown"):
        model.add_callback(event, getattr(pruning, event))
    return pruning


def _renew(trainer: Any, event: Event = None) -> None:
    """After a cut, see to what ultralytics keeps beside the tensors."""
    if isinstance(event, Entry) and not event.changed:
        return
    average = trainer.ema
    for model in (unwrapped(trainer.model), *([] if average is None else [average.ema])):
        for module in model.modules():
            # The exporter exchanges the forward of a `C2f` for its `forward_split`: let it find the corrected widths.
            if hasattr(type(module), "forward_split"):
                module.__dict__.pop("forward_split", None)
                if isinstance(corrected := module.__dict__.get("forward"), SizedForward):
                    module.__dict__["forward_split"] = corrected
    if average is not None:
        average._pairs = None  # a list of tensors, which would keep the memory from before the cut


def _total_steps(trainer: Any) -> int | None:
    """Optimizer steps of a run, None where the clock ends it; while it warms up, fewer batches make a step.

    >>> from types import SimpleNamespace
    >>> args = SimpleNamespace(time=None, warmup_epochs=1.0)
    >>> trainer = SimpleNamespace(args=args, epochs=4, train_loader=range(8), accumulate=4)
    >>> _total_steps(trainer)  # after batches 0, 1, 3, 6, 10, 14, 18, 22, 26 and 30
    10
    """
    if trainer.args.time:
        return None
    batches, epochs, accumulate = len(trainer.train_loader), trainer.epochs, trainer.accumulate
    warm = round(min(trainer.args.warmup_epochs, max(epochs - 1, 0)) * batches)
    steps, last, gathered = 0, -1, accumulate
    for number in range(batches * epochs):
        if warm and number <= warm:
            gathered = max(1, int(np.interp(number, [0, warm], [1, accumulate]).round()))
        if number - last >= gathered:
            steps, last = steps + 1, number
    return steps
