"""A fingerprint: a digest of what decides on what is found in a model, so that equal models are tried out once.

It covers the code of a model, as bytecode, with the functions, classes, modules and values that this code names or
imports; attributes, hooks and buffers of all modules; shapes, kinds and ties of tensors; modes of PyTorch; and
versions. What holds anything else, such as code in C of the user's own, has no fingerprint, and is tried out each time.
Nor has code of the user's own that asks what may change: the clock, chance, files, the environment, or a table by a
name that it computes.
"""

from __future__ import annotations

import builtins
import enum
import hashlib
import inspect
import logging
import re
import sys
import threading
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from math import isfinite
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GenericAlias,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    UnionType,
    WrapperDescriptorType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.hooks import RemovableHandle

from setpoint.groups.by_method import MethodForward
from setpoint.groups.example import Example, tensors_of
from setpoint.groups.follow_data import PACKAGE, is_library
from setpoint.groups.lookups import Import, Lookups, changing, is_constant, lookups
from setpoint.groups.users_hooks import is_setpoints
from setpoint.groups.walk import registered
from setpoint.words import a_type

_MOST_THINGS = 300_000
_MOST_BYTES = 64 * 2**20


class NoFingerprintError(Exception):
    """A model holds what nothing is known about."""


def fingerprint(model: nn.Module, example: Example) -> str:
    """The digest, in hexadecimal; "" for a model that has none."""
    try:
        description = _Description(model, example)
        for part in (_versions(), _modes()):
            description.value(part)
        description.library()
        description.model(model)
        description.example(example)
        description.unreached()
        return description.digest
    except Exception:  # noqa: BLE001 - foreign objects may raise anything when they are looked at; none is known then
        return ""


def digest(*facts: str) -> str:
    """A digest of texts, in hexadecimal; "" if one of them is empty."""
    return hashlib.sha256("\0".join(facts).encode()).hexdigest() if all(facts) else ""


@cache
def _own_files() -> tuple[str, ...]:
    files = [(str(each.relative_to(PACKAGE)), each.stat()) for each in sorted(PACKAGE.rglob("*.py"))]
    return tuple(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files)


def _versions() -> list[str]:
    own = str(vars(sys.modules["setpoint"]).get("__version__"))  # this file may not import what lies above it
    return [sys.version, own, torch.__version__, np.__version__, str(PACKAGE), *_own_files()]


def _modes() -> list[str]:
    """Switches of PyTorch that a forward may follow."""
    overrides: Any = torch.overrides
    dispatch: Any = torch.utils._python_dispatch
    if overrides._len_torch_function_stack() or dispatch._len_torch_dispatch_stack():
        raise NoFingerprintError("a mode of the user's is active")
    tables: Any = vars(nn.modules.module)
    if any(table for name, table in tables.items() if name.startswith(("_global_forward", "_global_backward"))):
        raise NoFingerprintError("a hook on all modules is set")
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise NoFingerprintError("hooks on saved tensors are set")
    kinds = ("cpu", "cuda")
    backends: Any = torch.backends
    cuda: Any = torch.cuda
    return [
        *(f"{kind} {torch.is_autocast_enabled(kind)} {torch.get_autocast_dtype(kind)}" for kind in kinds),
        f"{torch.is_grad_enabled()} {torch.is_inference_mode_enabled()} {torch.get_default_dtype()}",
        f"{torch.are_deterministic_algorithms_enabled()} {torch.get_float32_matmul_precision()}",
        f"{backends.cuda.flash_sdp_enabled()} {backends.cuda.mem_efficient_sdp_enabled()}",
        f"{backends.cuda.math_sdp_enabled()} {backends.mkldnn.enabled} {backends.cudnn.enabled}",
        f"{torch.backends.mha.get_fastpath_enabled()} {backends.cuda.cudnn_sdp_enabled()}",
        f"{torch.is_anomaly_enabled()} {torch.is_autocast_cache_enabled()}",
        cuda.get_device_name() if cuda.is_initialized() else "",
    ]


_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), range, slice),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, np.dtype),
)
_BY_NAME = (
    *(BuiltinFunctionType, GetSetDescriptorType, MemberDescriptorType, MethodDescriptorType, MethodWrapperType),
    *(WrapperDescriptorType, torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator),
)
_PYTHON = (FunctionType, staticmethod, classmethod, property)
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None))
_SHORT = 100
_HIDDEN = {
    "__dict__",
    "__weakref__",
    "__doc__",
    "__annotations__",
    "__annotate__",
    "__static_attributes__",
    "_abc_impl",
    "__slotnames__",
}
_HIDDEN |= {"__firstlineno__", "__slots__", "__module__", "__qualname__", "__abstractmethods__", "__parameters__"}
_OF_A_FILE = {"__builtins__", "__cached__", "__doc__", "__file__", "__loader__", "__name__", "__package__", "__path__"}
_OF_A_FILE |= {"__spec__", "__annotations__", "__annotate__", "__conditional_annotations__", "__warningregistry__"}
_OF_A_PROCESS = {"SESSION_ID", "_original_object_hash"}
"""What Transformers draws anew in each process: an identifier for downloads, and a hash of its settings."""
_CONSTRUCTORS = ("__init__", "__new__", "__post_init__")
_WRAPPERS = (staticmethod, classmethod, property, cached_property, partial)
_OF_A_WRAPPER = {*_HIDDEN, "__name__", "__wrapped__", "__type_params__"}
_OF_A_PROPERTY = {*_OF_A_WRAPPER, "func", "attrname", "lock"}
"""What Python notes there of the function."""
_STATISTICS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.modules.batchnorm._NormBase: ("running_mean", "running_var", "num_batches_tracked"),
    torch.nn.utils.parametrizations._SpectralNorm: ("_u", "_v"),
}
_MANY = 8


@dataclass(frozen=True)
class _Named:
    """What stands for a tensor or a module of the model, or an input."""

    name: str


class _Description:
    """A running digest, which changes with all that is described."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no two things have one id
        self._bytes = 0
        self._visited: set[str] = set()
        self._kinds: set[type] = set()
        self._live = True  # whether what is described may run in a forward
        self._later: dict[tuple[int, str], tuple[type, Any]] = {}
        self._mentioned = {"forward"}
        self._by_any_name = False
        self._known: dict[int, _Named] = {}
        for number, tensor in enumerate(tensors_of(example)):
            self._known[id(tensor)] = _Named(f"input {number}")
        for name, module in model.named_modules():
            self._known[id(module)] = _Named(f"module {name}")
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._known.setdefault(id(tensor), _Named(f"tensor {name}"))

    @property
    def digest(self) -> str:
        """In hexadecimal."""
        return self._hash.hexdigest()

    def text(self, *parts: str) -> None:
        """Texts, each with its length, so that no two lists of them are one."""
        self._hash.update("".join([f"{len(part)}:{part}" for part in parts]).encode(errors="surrogatepass"))

    def model(self, model: nn.Module) -> None:
        """All modules and tensors, by all names that they have."""
        seen: dict[int, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            first = seen.setdefault(id(module), name)
            self.text("module", name, first)
            if first != name:
                continue
            if isinstance(module, torch.jit.ScriptModule):
                raise NoFingerprintError(f"{name} is a script")
            self.of_class(type(module), made=True)
            self._hooks(module)
            computed = {each.name for each in module._forward_pre_hooks.values() if isinstance(each, WeightNorm)}
            for key, value in vars(module).items():
                if key in ("_parameters", "_buffers", "_modules") or _holds_hooks(key, value):
                    continue
                self.text(key)
                if key in computed and isinstance(value, Tensor):
                    self._outside(value)
                else:
                    self.value(value)
                if isinstance(value, MethodForward):
                    self._mentioned.add(value.method)
        ties: dict[int, str] = {}
        buffers = dict(model.named_buffers(remove_duplicate=False))
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *buffers.items()):
            self.text(name, ties.setdefault(id(tensor), name))
            self._outside(tensor)
            if type(tensor) not in (Tensor, nn.Parameter):
                raise NoFingerprintError(f"{name} is {a_type(tensor)}")
            if name in buffers and not self._is_statistic(model, name):
                self._content(tensor)
            else:
                self._range(tensor)

    def _hooks(self, module: nn.Module) -> None:
        """Hooks in their order, each by its number among the module's: PyTorch counts those of a whole process."""
        tables = {key: table for key, table in vars(module).items() if _holds_hooks(key, table)}
        order = {key: number for number, key in enumerate(sorted({key for each in tables.values() for key in each}))}
        for name, table in tables.items():
            self.text(name, str(len(table)))
            for key, hook in table.items():
                self.text(str(order[key]))
                self.value(hook)

    def _is_statistic(self, model: nn.Module, name: str) -> bool:
        """Whether a buffer is an average that training moves: like weights, it decides by its range alone."""
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        return any(isinstance(module, kind) and key in keys for kind, keys in _STATISTICS.items())

    def _range(self, tensor: Tensor) -> None:
        """Whether numbers of a weight are finite, and whether many have one sign: cuts are tried at about these."""
        tensor = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel() or tensor.layout != torch.strided:
            return
        try:
            least, most = (float(end) for end in tensor.detach().aminmax())
        except NotImplementedError:  # of narrow types PyTorch compares no entries
            return
        self.text("finite" if isfinite(least) and isfinite(most) else "not finite")
        if tensor.numel() >= _MANY:  # fewer random numbers often have one sign
            self.text(str(least >= 0), str(most <= 0))

    def example(self, example: Example) -> None:
        """What the inputs are made of; of tensors all but the numbers, unless these are none."""
        for tensor in tensors_of(example):
            self._outside(tensor)
            if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
                raise NoFingerprintError("an input is not finite")
            self.text("constant" if not tensor.is_meta and tensor.numel() and self._constant(tensor) else "varied")
        self.value(dict(example) if isinstance(example, Mapping) else example)

    def _constant(self, tensor: Tensor) -> bool:
        return bool((tensor == tensor.flatten()[0]).all())

    def library(self) -> None:
        """What has been changed in PyTorch from outside, and rules for ops that are not this package's own."""
        for name in ("torch", "torch.nn.functional", "torch.nn.modules.module", "torch.autograd.function"):
            self._namespaces(name)
        self.of_class(Tensor)
        for op, function in registered():
            if not function.__module__.startswith("setpoint."):
                self.text(str(op))
                self.value(function)

    def value(self, value: Any) -> None:
        """Anything that a module or its code may hold.

        Raises:
            NoFingerprintError: for what holds more than can be seen.
        """
        kind = type(value)
        if kind in _PLAIN:
            self.text(kind.__name__, repr(value))
            return
        if kind is tuple or kind is frozenset:  # whether equal constants are one object differs between processes
            self.text(kind.__name__)
            self._contents(value)
            return
        if id(value) in self._known:
            self.text(self._known[id(value)].name)
            return
        if id(value) in self._seen:
            self.text("again", str(self._seen[id(value)]))
            return
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        if len(self._seen) > _MOST_THINGS:
            raise NoFingerprintError("it holds too much")
        self._new(value, kind)

    def _new(self, value: Any, kind: type) -> None:
        self.text(f"{kind.__module__}.{kind.__qualname__}")
        if self._live and not isinstance(value, type) and changing(value):
            raise NoFingerprintError(f"{value!r} may answer another way another time")
        if isinstance(value, Tensor):
            self._outside(value)
            self._content(value)
        elif kind is np.ndarray and value.dtype != object:
            self.text(str(value.dtype), str(value.shape))
            self._add(value.tobytes())
        elif isinstance(value, re.Pattern):
            self.text(repr(value.pattern), str(value.flags))
        elif isinstance(value, enum.Enum):
            self.text(repr(value))
            self.of_class(kind, made=True)
            self._attributes(value, {"__objclass__"})
        elif isinstance(value, (np.generic, Path, UnionType, GenericAlias)):
            self.text(repr(value))
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self.value(value.__func__)
            self.value(value.__self__)
        elif isinstance(value, _BY_NAME):
            self._by_name(value)
        elif isinstance(value, type):
            self.of_class(value)
        elif isinstance(value, ModuleType):
            self._whole(value)
        elif isinstance(value, RemovableHandle):  # it only takes a hook away
            self.text("handle")
        elif isinstance(value, (staticmethod, classmethod)):
            self._wrapper(value, value.__func__)
        elif isinstance(value, property):
            self._wrapper(value, value.fget, value.fset)
        elif isinstance(value, cached_property):
            self._wrapper(value, value.func)
        elif isinstance(value, partial):
            self._wrapper(value, value.func, value.args, value.keywords)
        elif isinstance(value, weakref.ref):
            self.value(value())
        elif isinstance(value, MappingProxyType):
            self.value(dict(value))
        elif isinstance(value, logging.Logger):
            self.text("logger", str(value.getEffectiveLevel()))
            self._attributes(value, vars(logging.Logger("")).keys())
        elif isinstance(value, _LOCKS):
            self.text("lock")
        else:
            self._object(value, kind)

    def _values(self, values: Iterable[Any]) -> None:
        for each in values:
            self.value(each)

    def _wrapper(self, value: Any, *parts: Any) -> None:
        """What holds functions, by these; a class of the user's own that does so, by what it adds, too."""
        self._values(parts)
        if type(value) not in _WRAPPERS:
            self.of_class(type(value), made=True)
        self._attributes(value, _OF_A_PROPERTY if isinstance(value, cached_property) else _OF_A_WRAPPER)

    def _attributes(self, value: Any, but: Container[str]) -> None:
        for name, held in getattr(value, "__dict__", {}).items():
            if name not in but:
                self.text(name)
                self.value(held)

    def _object(self, value: Any, kind: type) -> None:
        """An object by its class, what it contains, and its attributes."""
        solid = next(each for each in kind.__mro__ if not each.__flags__ & _MADE_IN_PYTHON)
        if solid not in (object, dict, list, tuple, set, frozenset, *_ORDERED, *_PLAIN):
            raise NoFingerprintError(f"{kind.__qualname__} is not made in Python")
        if any(type(each).__name__ == "pybind11_type" for each in kind.__mro__):  # its state is in C++
            raise NoFingerprintError(f"{kind.__qualname__} is not made in Python")
        if any(each.__module__ in ("random", "_random") for each in kind.__mro__):
            raise NoFingerprintError("it holds a source of chance")
        attributes = getattr(value, "__dict__", None)
        slots = [name for each in kind.__mro__ for name in _slots(each)]
        contains = isinstance(value, (dict, list, tuple, set, frozenset)) or solid in _PLAIN
        if attributes is None and not slots and not contains and kind is not object:
            raise NoFingerprintError(f"nothing is known of a {kind.__qualname__}")
        if kind not in (dict, list, tuple, set, frozenset, *_ORDERED):
            self.of_class(kind, made=True)
        if isinstance(value, (dict, set, frozenset, list, tuple)):
            self._contents(value)
        elif contains:
            self.text(solid.__repr__(value))  # its own may say less
        for name in slots:
            self.text(name)
            self.value(getattr(value, name, None))
        self._attributes(value, _OF_A_PROCESS)

    def _contents(self, value: Any) -> None:
        self.text(str(len(value)))
        if isinstance(value, (set, frozenset)):
            if not all(type(each) in _PLAIN for each in value):
                raise NoFingerprintError("a set of objects has no order")
            self.text(*sorted(f"{type(each).__name__} {each!r}" for each in value))
        else:
            self._values((part for item in value.items() for part in item) if isinstance(value, dict) else value)

    def of_class(self, kind: type, *, made: bool = False) -> None:
        """A class: of the user's own, everything in it; of a library, what has been put there from outside.

        Args:
            made: it was met as that of an object which is there already, so that no forward calls its constructors.
        """
        if not made:
            self._reached(
                [each for each in self._later if each[1] in _CONSTRUCTORS and self._later[each][0] in kind.__mro__]
            )
        if self._seen.get(-id(kind)) is not None:
            self.text("class", str(self._seen[-id(kind)]))
            return
        self._seen[-id(kind)] = len(self._seen)
        self._alive.append(kind)
        for each in kind.__mro__:
            self.text(f"{each.__module__}.{each.__qualname__}")
            if not each.__flags__ & _MADE_IN_PYTHON or _is_bound(each):
                continue
            library = self._is_its(each)
            if library:
                self._namespaces(each.__module__)
            if type(each) is not type and not self._is_its(type(each)):
                self.of_class(type(each), made=True)
            for name, held in vars(each).items():
                if name in _HIDDEN:
                    continue
                if library and not self._of_user(held):
                    self._of_library(name, held)
                    continue
                self.text(name)
                if not library and self._may_wait(each, name, held, made=made):
                    self._later[id(each), name] = each, held
                else:
                    self.value(held)

    def _may_wait(self, kind: type, name: str, held: Any, *, made: bool) -> bool:
        """Whether this may be a method that no forward calls: no code of a library knows it, so its name tells."""
        if not self._live or not isinstance(held, (FunctionType, staticmethod, classmethod)):
            return False
        if name in _CONSTRUCTORS:
            return made
        bases = [each for each in kind.__mro__ if self._is_its(each)]
        plain = all(not each.__flags__ & _MADE_IN_PYTHON or each.__module__.startswith("torch.nn.") for each in bases)
        return plain and not name.startswith("__") and not any(name in vars(each) for each in bases)

    def _reached(self, keys: Iterable[tuple[int, str]]) -> None:
        for key in keys:
            if key in self._later:  # else another has been through it meanwhile
                _, held = self._later.pop(key)
                self.text(key[1])
                self.value(held)

    def unreached(self) -> None:
        """The methods that wait: first those that a forward may call by name, then the rest, which may do anything."""
        while keys := [each for each in self._later if self._is_mentioned(each[1])]:
            self._reached(keys)
        self._live = False
        while self._later:
            self._reached(list(self._later))

    def _is_mentioned(self, name: str) -> bool:
        return name not in _CONSTRUCTORS and (self._by_any_name or name in self._mentioned)

    def _by_name(self, value: Any) -> None:
        self.text(str(getattr(value, "__module__", "")), str(getattr(value, "__qualname__", value)))
        held = getattr(value, "__self__", None)
        if held is not None and not isinstance(held, (ModuleType, type)):
            self.value(held)
        elif isinstance(held, ModuleType) or isinstance(value, BuiltinFunctionType):
            owner = held.__name__ if isinstance(held, ModuleType) else getattr(held, "__module__", None)
            name = str(owner if isinstance(held, (ModuleType, type)) else value.__module__)
            if not name.startswith(("torch", "builtins", "_operator", "math")) and not _is_library(name):
                raise NoFingerprintError(f"{value!r} is code in C")

    def _function(self, function: FunctionType) -> None:
        library = _is_librarys(function)
        self.text(function.__module__ or "", function.__qualname__)
        self._code(function.__code__)
        self._values((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # it is still empty
                continue
            # What a library's decorator keeps for itself is the library's.
            if not library or isinstance(held, (*_PLAIN, FunctionType, MethodType, type, partial)):
                self.value(held)
        for name, held in vars(function).items():
            # Implementations by type, as `functools.singledispatch` keeps them, are the user's.
            if not library or isinstance(held, (*_PLAIN, FunctionType, MethodType, MappingProxyType, type)):
                self.text(name)
                self.value(held)
        if library:
            # Its own module: a decorator of a library's names that of what it wraps.
            self._namespaces(str(function.__globals__.get("__name__", "")))
        else:
            self._looked_up(function, lookups(function.__code__))

    def _looked_up(self, function: FunctionType, looked: Lookups) -> None:
        """What code of the user's own names and imports.

        Raises:
            NoFingerprintError: it asks what may change, and may run in a forward.
        """
        names = {**vars(builtins), **function.__globals__}
        if self._live:
            self._mentioned |= looked.mentioned
            self._by_any_name |= looked.by_any_name
            if looked.files or looked.inner or not all(each and _is_module(names, each) for each in looked.dynamic):
                raise NoFingerprintError(f"{function.__qualname__} asks by a name that it computes, or reads a file")
        for name in sorted(looked.globals & names.keys()):
            self.text(name)
            self._named(names[name], name, looked, ())
        for each in looked.imports:
            self._imported(function, each, looked)

    def _imported(self, function: FunctionType, wanted: Import, looked: Lookups) -> None:
        """What is imported inside a function."""
        try:
            path = wanted.path(function.__globals__)
        except ImportError:
            path = ""
        self.text("import", path, wanted.attribute)
        module = sys.modules.get(path)
        found: Any = module
        if module is not None and wanted.attribute:
            missing = sys.modules.get(f"{path}.{wanted.attribute}")
            held = vars(module).get(wanted.attribute, missing)
            # Some libraries make what they hold when it is asked for.
            found = getattr(module, wanted.attribute, None) if held is None and _is_library(path) else held
            if found is None and wanted.attribute in vars(module):
                return
        if found is not None:
            self._named(found, wanted.name, looked, ())
        elif self._live:
            raise NoFingerprintError(f"{function.__qualname__} imports what is not there yet")

    def _named(self, value: Any, name: str, looked: Lookups, above: tuple[ModuleType, ...]) -> None:
        """What code names; of a module what the code takes from it."""
        taken = looked.taken(name)
        hidden = isinstance(value, ModuleType) and any(
            each.startswith("__") and each not in vars(value) for each in taken
        )
        constant = isinstance(value, ModuleType) and not looked.whole(name) and is_constant(value.__name__, taken)
        if self._live and changing(value) and not constant:
            raise NoFingerprintError(f"{name} may answer another way another time")
        if not isinstance(value, ModuleType):
            self.value(value)
            return
        if hidden or looked.whole(name):  # as by helper.__dict__[...]
            self.value(value)
        self.text("namespace", value.__name__)
        if value in above:
            return
        library = _is_library(value.__name__)
        if library:
            self._namespaces(value.__name__)
        elif "__getattr__" in vars(value):
            self.value(vars(value)["__getattr__"])
        for each in taken:
            held = vars(value).get(each)
            if each in vars(value) and (not library or isinstance(held, ModuleType) or (self._live and changing(held))):
                self.text(each)
                self._named(held, each, looked, (*above, value))

    def _whole(self, module: ModuleType) -> None:
        """A module that code holds as a value: of the user's own, all that it holds."""
        self.text(module.__name__)
        if _is_library(module.__name__):
            self._namespaces(module.__name__)
            return
        for name, held in vars(module).items():
            if name not in _OF_A_FILE:
                self.text(name)
                self.value(held)

    def _namespaces(self, name: str) -> None:
        """A module of a library, and those of the same library that it takes something from."""
        waiting = [name]
        while waiting:
            name = waiting.pop()
            module = sys.modules.get(name)
            top = name.partition(".")[0]
            if module is None or name in self._visited or top in sys.stdlib_module_names:
                continue
            self._visited.add(name)
            version = str(getattr(sys.modules.get(top), "__version__", ""))
            self.text(name, version, _stamp(str(getattr(module, "__file__", ""))))
            for key, held in tuple(vars(module).items()):
                if not key.startswith("__") and key not in _OF_A_PROCESS:
                    self._in_namespace(key, held)
                    source = held.__name__ if isinstance(held, ModuleType) else getattr(held, "__module__", None)
                    if isinstance(source, str) and source.partition(".")[0] == top not in ("torch", "setpoint"):
                        waiting.append(source)

    def _of_library(self, name: str, held: Any) -> None:
        """What a class of a library holds of libraries: another one may have put it there, or set a value anew."""
        function = _function_in(held)
        if isinstance(function, FunctionType):
            code = function.__code__
            self.text(name, code.co_filename, code.co_code.hex(), *code.co_names)
        elif _is_simple(held):
            self.text(name, repr(held))

    def _in_namespace(self, key: str, held: Any) -> None:
        """What was put into a namespace, in place of what was there, or by a user into a table of functions in it."""
        if self._of_user(held):
            self.text(key)
            self.value(held)
        elif isinstance(held, FunctionType):
            self.text(key, held.__qualname__, held.__code__.co_filename)
        elif isinstance(held, type):
            self.text(key, held.__module__, held.__qualname__)
        elif _is_simple(held):
            self.text(key, repr(held))
        elif not isinstance(held, (ModuleType, Tensor)):
            kind = type(held)
            shared = () if kind in self._kinds else tuple(vars(kind).values())  # once for all that are of this kind
            self._kinds.add(kind)
            for table in (held, *tuple(getattr(held, "__dict__", {}).values()), *shared):
                for entry, each in tuple(dict.items(table)) if isinstance(table, dict) else ():
                    if isinstance(each, _MAY_BE_OF_A_USER) and self._of_user(each):  # of plain values tables are long
                        self.text(key, str(entry))
                        self.value(each)

    def _of_user(self, held: Any) -> bool:
        """Whether this is a function or class of the user's own."""
        held = _function_in(held)
        if isinstance(held, FunctionType):
            inner = inspect.unwrap(held)
            return any(not _is_librarys(each) for each in (held, inner) if isinstance(each, FunctionType))
        if not isinstance(held, type) or not held.__flags__ & _MADE_IN_PYTHON or _is_bound(held):
            return False
        in_python = any(isinstance(each, _PYTHON) for each in vars(held).values())
        return in_python and not self._is_its(held)

    def _is_its(self, kind: type) -> bool:
        """Whether a class is one of a library's, by the name that it gives itself."""
        found: Any = sys.modules.get(kind.__module__)
        for name in kind.__qualname__.split("."):
            found = vars(found).get(name) if isinstance(found, (type, ModuleType)) else None
        return found is kind and _is_library(kind.__module__)

    def _code(self, code: CodeType) -> None:
        """What it does: no lines, no names of files."""
        self.text(code.co_code.hex(), *code.co_names, "/", *code.co_varnames, "/", *code.co_freevars, *code.co_cellvars)
        self.text(str(code.co_argcount), str(code.co_kwonlyargcount), str(code.co_flags))
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._code(constant)
            else:
                self.value(constant)

    def _outside(self, tensor: Tensor) -> None:
        """All of a tensor but its numbers."""
        tables = [getattr(tensor, name, None) or {} for name in ("_backward_hooks", "_post_accumulate_grad_hooks")]
        if not all(is_setpoints(hook) for table in tables for hook in table.values()):  # a loop that waits has one
            raise NoFingerprintError("a tensor has hooks")
        strided = tensor.layout == torch.strided
        self.text(f"{type(tensor).__name__} {tuple(tensor.shape)} {tensor.dtype} {tensor.device} {tensor.layout}")
        self.text(f"{tensor.requires_grad} {tensor.stride() if strided else None} {tensor.is_leaf}")

    def _content(self, tensor: Tensor) -> None:
        if tensor.is_meta or not tensor.numel():
            return
        if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized:
            raise NoFingerprintError("a tensor's numbers are not plain")
        if tensor.numel() * tensor.element_size() > _MOST_BYTES:
            raise NoFingerprintError("a constant is large")
        flat = tensor.detach().cpu().contiguous().flatten()
        self._add(flat.view(torch.uint8).numpy().tobytes())

    def _add(self, content: bytes) -> None:
        self._bytes += len(content)
        if self._bytes > 4 * _MOST_BYTES:
            raise NoFingerprintError("the constants are large")
        self._hash.update(content)


_MAY_BE_OF_A_USER = (FunctionType, type, staticmethod, classmethod, MethodType, property, partial)
_MADE_IN_PYTHON = 1 << 9
"""The flag of classes that are made while a program runs."""

_ORDERED = (OrderedDict, defaultdict)


def _is_bound(kind: type) -> bool:
    """Whether a class is one of PyTorch's in C++."""
    return type(kind).__name__ == "pybind11_type" and str(kind.__module__).partition(".")[0] == "torch"


def _function_in(held: Any) -> Any:
    """What a method, a property or a part of a function is made of; anything else as it is.

    A method of a library that saves or loads is wrapped at the first `attach`. What counts is what was there before.
    """
    if isinstance(held, (staticmethod, classmethod, MethodType)):
        held = held.__func__
    elif isinstance(held, property):
        held = held.fget
    elif isinstance(held, partial):
        held = held.func
    wrapped = getattr(held, "__wrapped__", None) if isinstance(held, FunctionType) else None
    own = wrapped is not None and PACKAGE in Path(held.__code__.co_filename).parents
    return _function_in(wrapped) if own else held


def _is_simple(held: Any) -> bool:
    """Whether this is a constant, or a short tuple or list of constants: longer ones are records that grow."""
    if isinstance(held, (tuple, list)):
        return len(held) <= _SHORT and all(type(each) in _CONSTANTS for each in held)
    return type(held) in _CONSTANTS


def _slots(kind: type) -> tuple[str, ...]:
    """Names of the slots of a class, private ones as Python mangles them."""
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    private = f"_{kind.__name__.lstrip('_')}"
    return tuple(
        f"{private}{name}" if name.startswith("__") and not name.endswith("__") else name
        for name in names
        if name not in ("__dict__", "__weakref__")
    )


def _holds_hooks(name: str, value: Any) -> bool:
    """Whether an attribute of a module is one of its tables of hooks."""
    tables = name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
    return tables and isinstance(value, dict) and all(type(each) is int for each in value)


def _is_module(names: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    """Whether a dotted name is that of a module."""
    found: Any = names.get(path[0])
    for each in path[1:]:
        found = vars(found).get(each) if isinstance(found, ModuleType) else None
    return isinstance(found, ModuleType)


@cache
def _is_file_of_library(file: str) -> bool:
    path, standard = Path(file), Path(inspect.__file__).parent
    return is_library(file) or PACKAGE in path.parents or standard in path.parents or file.startswith("<frozen ")


def _is_library(name: str) -> bool:
    """Whether a Python module is a library's: all but what a user has written."""
    if name == "__main__" or name not in sys.modules:
        return False
    top = name.partition(".")[0]
    file = str(getattr(sys.modules[name], "__file__", None) or "")
    return top in ("torch", "setpoint", *sys.builtin_module_names) or _is_file_of_library(file)


def _is_librarys(function: FunctionType) -> bool:
    """Whether a function is a library's: where it was made by `exec`, in a module of one."""
    file = function.__code__.co_filename
    if file.startswith("<") and not file.startswith("<frozen "):
        name = str(function.__globals__.get("__name__", ""))
        return _is_library(name) and vars(sys.modules[name]) is function.__globals__
    return _is_file_of_library(file)


def _stamp(file: str) -> str:
    try:
        stat = Path(file).stat()
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"
