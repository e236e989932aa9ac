"""Checkpointing, enabled once per process: PyTorch, transformers and diffusers save and load the sizes of cut models.

Folders of pretrained models hold them in `setpoint.json`.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from setpoint.actuator.in_state_dict import KEY, StateSizes
from setpoint.actuator.model_shapes import ModelShapes, was_cut
from setpoint.checkpoint.fit import fit
from setpoint.checkpoint.model_file import SIZES_FILE
from setpoint.checkpoint.resumable import is_resumable, may_be_cut, resumable, shrink_to
from setpoint.distributed import unwrapped
from setpoint.errors import as_written
from setpoint.host.copies import LISTED
from setpoint.integrations.session import Session

_HINT = (
    f"cut by Setpoint: {SIZES_FILE} has the true widths, and this config may say those of the dense model; call "
    "setpoint.enable_checkpointing() before from_pretrained"
)
_TRANSFORMERS = "transformers"  # which integrations/transformers.py imports; here it is looked for when it is asked for


def enable_checkpointing() -> None:
    """Make each model of this process resumable that was cut, or that loads the state dict of a cut model.

    The function wraps `torch.nn.Module.load_state_dict` and makes models resumable as they load. A state without sizes
    whose shapes no cut can have loads as usual into a model that was never cut. `save_pretrained` and `from_pretrained`
    of transformers and diffusers are wrapped, too: both are imported where they are installed, which takes seconds.
    So do pipelines, sentence-transformers and all else that calls these methods. A second call changes nothing.

    >>> from setpoint import shrink_to
    >>> enable_checkpointing()
    >>> small = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).state_dict()
    >>> cut = shrink_to(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), small)
    >>> dense = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> dense.load_state_dict(cut.state_dict())
    <All keys matched successfully>
    >>> dense[0]
    Linear(in_features=2, out_features=3, bias=True)
    """
    _replace_once(nn.Module, "load_state_dict", _load_with_sizes)
    for enable in (enable_transformers, enable_diffusers):
        with suppress(ImportError):
            enable()


def enable_transformers() -> None:
    """Let folders and checkpoints of transformers carry the sizes of cut models; a second call changes nothing."""
    model_class = import_module(f"{_TRANSFORMERS}.modeling_utils").PreTrainedModel
    trainer_class = import_module(f"{_TRANSFORMERS}.trainer").Trainer
    _replace_once(model_class, "save_pretrained", _save_with_sizes)
    _replace_once(model_class, "_load_pretrained_model", _load_for_transformers)
    _replace_once(trainer_class, "_load_from_checkpoint", _load_for_trainer)
    _replace_once(trainer_class, "train", _train)


def enable_diffusers() -> None:
    """The same for folders of diffusers' models."""
    model_class = import_module("diffusers.models.modeling_utils").ModelMixin
    _replace_once(model_class, "save_pretrained", _save_with_sizes)
    _replace_once(model_class, "_load_pretrained_model", _load_for_diffusers)
    _replace_once(import_module("diffusers.training_utils").EMAModel, "save_pretrained", _save_average)


def _replace_once(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Have a method of a class call `replacement`, with the method as its first argument, unless it does already."""
    found = inspect.getattr_static(owner, name)  # a static or a class method is to stay one
    plain = getattr(found, "__func__", found)
    if hasattr(plain, "by_setpoint"):
        return

    @wraps(plain)
    def method(*args: Any, **settings: Any) -> Any:
        return replacement(plain, *args, **settings)

    method.by_setpoint = True  # type: ignore[attr-defined]
    setattr(owner, name, type(found)(method) if isinstance(found, (staticmethod, classmethod)) else method)


def _load_with_sizes(load: Callable[..., Any], self: nn.Module, state_dict: Any, *args: Any, **settings: Any) -> Any:
    metadata = getattr(state_dict, "_metadata", None) or {}
    if not is_resumable(self) and (
        was_cut(self) or any(KEY in entry for entry in metadata.values()) or may_be_cut(self, state_dict)
    ):
        resumable(self)
    return load(self, state_dict, *args, **settings)


def _save_with_sizes(save: Callable[..., Any], self: Any, save_directory: Any, *args: Any, **settings: Any) -> Any:
    result = save(self, save_directory, *args, **settings)
    # Of several ranks one writes; where the path is a file, transformers only logs an error.
    if settings.get("is_main_process", True) and Path(save_directory).is_dir():
        write_sizes(self, Path(save_directory))
    return result


def _save_average(save: Callable[..., Any], self: Any, path: Any) -> Any:
    """Save an average of a cut model: diffusers would load it into a model that its config makes, which is dense."""
    cut = LISTED.get(self)
    if cut is None or not was_cut(cut) or None in (self.model_cls, self.model_config):
        return save(self, path)
    model: Any = shrink_to(self.model_cls.from_config(self.model_config), cut.state_dict())
    model.register_to_config(**{name: value for name, value in self.state_dict().items() if name != "shadow_params"})
    self.copy_to(model.parameters())
    return model.save_pretrained(path)


def _load_for_transformers(
    load: Callable[..., Any], model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, **settings: Any
) -> Any:
    file = _sizes_file(checkpoint_files, load_config)
    if file is not None:  # before the weights: loading compares their shapes with the model's
        read_sizes(file, model, model.base_model_prefix)
    return load(model, state_dict, checkpoint_files, load_config, **settings)


def _load_for_diffusers(
    load: Callable[..., Any], cls: Any, model: Any, state_dict: Any, files: Any, *args: Any, **settings: Any
) -> Any:
    if files and (file := Path(files[0]).parent / SIZES_FILE).is_file():
        read_sizes(file, model, "")
    return load(cls, model, state_dict, files, *args, **settings)


def _load_for_trainer(
    load: Callable[..., Any], self: Any, resume_from_checkpoint: Any, *args: Any, **settings: Any
) -> Any:
    # A Trainer reads weights without PyTorch's metadata, so the folder has to say that they were cut.
    if (Path(resume_from_checkpoint) / SIZES_FILE).is_file():
        resumable(self.model)
    return load(self, resume_from_checkpoint, *args, **settings)


def _train(train: Callable[..., Any], self: Any, *args: Any, **settings: Any) -> Any:
    """Make the Trainer known to its callback: no event has it, or the model in its wrappers."""
    callbacks = self.callback_handler.callbacks
    # First of all, so that what it adds to the logs is there when the others report them.
    callbacks.sort(key=lambda callback: not isinstance(callback, Session))
    for session in (callback for callback in callbacks if isinstance(callback, Session)):
        session.prepare(callbacks=callbacks)
        session.trainer = self
    return train(self, *args, **settings)


def _sizes_file(files: Any, load_config: Any) -> Path | None:
    """`setpoint.json` of a folder, or of a model on the Hub; None if there is none."""
    if not files or (local := Path(files[0]).parent / SIZES_FILE).is_file():
        return local if files else None
    name = load_config.pretrained_model_name_or_path
    if name is None or Path(str(name)).exists():
        return None
    # On the Hub only the files that transformers knows of are downloaded with the weights.
    options = {"_raise_exceptions_for_missing_entries": False, **(load_config.download_kwargs or {})}
    found = import_module(f"{_TRANSFORMERS}.utils").cached_file(name, SIZES_FILE, **options)
    return None if found is None else Path(found)


def write_sizes(model: nn.Module, folder: Path) -> None:
    """Write the sizes of a cut model into its folder; for a model that was never cut, remove the file."""
    file, model = folder / SIZES_FILE, unwrapped(model)
    carried = StateSizes.of(model) if was_cut(model) else None
    _write_hint(folder / "config.json", None if carried is None else _HINT)
    if carried is None:
        file.unlink(missing_ok=True)
        return
    plain = carried.plain()
    plain["transient"] = {
        name: {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
        for name, value in carried.transient.items()
    }
    file.write_text(json.dumps(plain, indent=1), encoding="utf-8")


def _write_hint(config: Path, hint: str | None) -> None:
    """For who reads a folder of transformers without Setpoint; diffusers would warn of the key at each load."""
    found = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if "model_type" in found and found.get(KEY) != hint:
        found = {name: value for name, value in {**found, KEY: hint}.items() if name != KEY or hint}
        config.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_sizes(file: Path, model: nn.Module, base: str) -> None:
    """Give a model, on the meta device or not, the shapes and sizes of a folder, whose weights are to be loaded next.

    The model is as its code builds it: of the class that was saved, or its base model, or one with a head on that;
    `base` is the name of the base model in models with a head, such as "bert". CheckpointError for a damaged file, or
    one of another model; the model is then as before.
    """
    with as_written(repr(str(file))):
        plain = json.loads(file.read_text(encoding="utf-8"))
        plain["transient"] = {
            name: torch.tensor(buffer["values"], dtype=getattr(torch, buffer["dtype"]))
            for name, buffer in plain["transient"].items()
        }
        carried = StateSizes.parse(plain)
    modules = dict(model.named_modules())
    names = {name for name, _ in carried.sizes if name}
    if not names <= modules.keys():
        inside = {name.removeprefix(f"{base}.") for name in names if name.startswith(f"{base}.")}
        if inside and inside <= modules.keys():
            carried = _renamed(carried, f"{base}.", "")
        elif {f"{base}.{name}" for name in names} <= modules.keys():
            carried = _renamed(carried, "", f"{base}.")
    own = ModelShapes.of(model).full(model)
    if carried.shapes and all(own.get(name) == shape for name, shape in carried.shapes.items()):
        return  # the model's config says its widths already
    fit(model, carried.shapes, carried.sizes, carried.transient)


def _renamed(carried: StateSizes, old: str, new: str) -> StateSizes:
    """With names that begin otherwise; what does not begin so belongs to a head that is not there."""

    def of(names: Mapping[str, Any]) -> dict[str, Any]:
        return {new + name.removeprefix(old): value for name, value in names.items() if name.startswith(old)}

    sizes = {
        ((new + module.removeprefix(old)).rstrip("."), place): size
        for (module, place), size in carried.sizes.items()
        if f"{module}.".startswith(old)
    }
    return StateSizes(sizes, of(carried.dense), of(carried.transient), of(carried.shapes))
