"""Hugging Face's folders: `save_pretrained` and `from_pretrained` carry the sizes of cut models."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from setpoint.actuator.carried import BEGUN
from setpoint.checkpoint.model_file import SIZES_FILE
from setpoint.checkpoint.resumable import resumable
from setpoint.integrations.pretrained import read_sizes, write_sizes

_MODULES = {
    "transformers.modeling_utils": "PreTrainedModel",
    "diffusers.models.modeling_utils": "ModelMixin",
    "transformers.trainer": "Trainer",
}
"""By name of a module, its class that saves or loads."""
_WRAPPED = {
    "transformers.modeling_utils": ("save_pretrained", "_load_pretrained_model"),
    "diffusers.models.modeling_utils": ("save_pretrained", "_load_pretrained_model"),
    "transformers.trainer": ("_load_from_checkpoint",),
}
"""By name of a module, the methods of that class that are wrapped."""


def enable_huggingface() -> None:
    """Let `save_pretrained` write `setpoint.json` beside a cut model's weights, and `from_pretrained` read it back.

    Pipelines, sentence-transformers and all else that calls these methods do the same. A Trainer reads its own
    checkpoints of cut models back, also without a callback. Transformers or diffusers may be imported later; the change
    is then made at the import. A second call changes nothing.
    """
    waiting = {each.name for each in sys.meta_path if isinstance(each, _Later)}
    for name in _MODULES:
        if name in sys.modules:
            _wrap(sys.modules[name])
        elif name not in waiting:
            sys.meta_path.insert(0, _Later(name))


def _enable_for(model: nn.Module) -> None:
    """Enable what is imported, where a model has it: `attach` and `compress` need no call of the user's.

    A version of a library whose methods are others is left alone: nobody has asked.
    """
    if any(hasattr(type(each), "save_pretrained") for each in model.modules()):
        for name, kind in _MODULES.items():
            made = getattr(sys.modules.get(name), kind, None)
            if made is not None and all(hasattr(made, each) for each in _WRAPPED[name]):
                _wrap(sys.modules[name])


BEGUN.append(_enable_for)


class _Later(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module as Python does, and enables it when it has been imported."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _wrap(module)


def _wrap(module: ModuleType) -> None:
    """Wrap the methods of its class, once."""
    kind = getattr(module, _MODULES[module.__name__])
    if module.__name__ == "transformers.trainer":
        _wrap_trainer(kind)
        return
    if getattr(kind.save_pretrained, "by_setpoint", False):
        return
    save, load = kind.save_pretrained, kind._load_pretrained_model

    @wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **settings: Any) -> Any:
        result = save(self, save_directory, *args, **settings)
        if settings.get("is_main_process", True) and Path(save_directory).is_dir():
            write_sizes(self, Path(save_directory))
        return result

    @wraps(load)
    def load_transformers(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, **settings: Any) -> Any:
        file = _sizes_file(checkpoint_files, load_config)
        if file is not None:
            read_sizes(file, model, model.base_model_prefix)
        return load(model, state_dict, checkpoint_files, load_config, **settings)

    @wraps(load)
    def load_diffusers(cls: Any, model: Any, state_dict: Any, files: Any, *args: Any, **settings: Any) -> Any:
        if files and (file := Path(files[0]).parent / SIZES_FILE).is_file():
            read_sizes(file, model, "")
        return load.__func__(cls, model, state_dict, files, *args, **settings)

    save_pretrained.by_setpoint = True  # type: ignore[attr-defined]
    kind.save_pretrained = save_pretrained
    diffusers = module.__name__.startswith("diffusers")
    kind._load_pretrained_model = classmethod(load_diffusers) if diffusers else staticmethod(load_transformers)


def _wrap_trainer(kind: Any) -> None:
    """A Trainer reads weights without what PyTorch keeps beside them, so the folder has to say that they were cut."""
    load = kind._load_from_checkpoint
    if getattr(load, "by_setpoint", False):
        return

    @wraps(load)
    def load_from_checkpoint(self: Any, resume_from_checkpoint: Any, *args: Any, **settings: Any) -> Any:
        if (Path(resume_from_checkpoint) / SIZES_FILE).is_file():
            resumable(self.model)
        return load(self, resume_from_checkpoint, *args, **settings)

    load_from_checkpoint.by_setpoint = True  # type: ignore[attr-defined]
    kind._load_from_checkpoint = load_from_checkpoint


def _sizes_file(checkpoint_files: Any, load_config: Any) -> Path | None:
    """`setpoint.json` of a folder, or of a model on the Hub; None if there is none."""
    if checkpoint_files and (local := Path(checkpoint_files[0]).parent / SIZES_FILE).is_file():
        return local
    name = load_config.pretrained_model_name_or_path
    if name is None or not checkpoint_files or Path(str(name)).exists():
        return None
    cached_file = sys.modules["transformers.utils"].cached_file
    found = cached_file(
        name, SIZES_FILE, _raise_exceptions_for_missing_entries=False, **(load_config.download_kwargs or {})
    )
    return None if found is None else Path(found)
