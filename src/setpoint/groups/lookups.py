"""Lookups: what code asks for by name while it runs, as its bytecode shows it."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import resolve_name
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_OF_AN_OBJECT = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR")
_SILENT = ("EXTENDED_ARG", "PUSH_NULL", "PRECALL", "CACHE", "NOP")

_CHANGING = {
    *("builtins", "sys", "importlib", "imp", "runpy", "pkgutil", "inspect", "gc", "ctypes"),
    *("os", "posix", "nt", "posixpath", "ntpath", "genericpath", "pathlib", "io", "_io", "glob", "shutil", "tempfile"),
    *("time", "datetime", "random", "_random", "secrets", "uuid", "subprocess", "socket", "pickle"),
    *("platform", "threading", "locale", "getpass", "asyncio", "contextvars"),
}
"""Modules that answer another way another time: by the clock, by chance, by files, or by names in a table."""

_CONSTANT = {("sys", "maxsize"), ("sys", "float_info"), ("sys", "version_info"), ("sys", "platform")}
_ASKING = (
    *(globals, locals, eval, exec, compile, open, input, __import__, breakpoint),
    *(torch.get_num_threads, torch.get_num_interop_threads),
)
_INNER = {"__globals__", "__builtins__", "__subclasses__", "f_globals", "f_locals", "f_builtins", "f_back"}
_FILES = {"read_text", "read_bytes", "is_file", "is_dir", "exists", "iterdir", "rglob", "open"}
"""Attributes that code takes of a path."""
_BY_ANY_NAME = {"__dict__", "vars", "dir", "methodcaller", "attrgetter", "__getattribute__"}


@dataclass(frozen=True)
class Import:
    """An import inside a function: the module, what is taken from it, and the local name of that."""

    module: str
    level: int
    attribute: str
    """"" for the module itself."""
    name: str
    """"" for one that is not known: then all of the module counts."""

    def path(self, names: dict[str, Any]) -> str:
        """The module's full name, for code with these globals; ImportError where it has none."""
        package = names.get("__package__")
        if package is None:
            own = str(names.get("__name__", ""))
            package = own if "__path__" in names else own.rpartition(".")[0]
        return resolve_name("." * self.level + self.module, package)


@dataclass(frozen=True)
class Lookups:
    """What a function and those inside of it look up."""

    uses: frozenset[tuple[str, str]]
    """Names that are loaded, each with the attribute that is taken of it at once; "" where it is handed on whole."""
    globals: frozenset[str]
    imports: tuple[Import, ...]
    dynamic: tuple[tuple[str, ...] | None, ...]
    """Of each `getattr` with a computed name the global that it is asked of, by its dotted name; None for others."""
    mentioned: frozenset[str]
    """Names and texts that may name a method."""
    by_any_name: bool
    """Whether attributes of an object are taken by names that the code does not show."""
    inner: bool
    """Whether it reaches into frames, or into globals of other functions."""
    files: bool
    """Whether it takes an attribute that reads files, as those of a path do."""

    def whole(self, name: str) -> bool:
        """Whether what has this name is handed on, so that others may take anything from it."""
        return not name or (name, "") in self.uses

    def taken(self, name: str) -> list[str]:
        """Attributes that are taken of what has this name."""
        return sorted(attribute for of, attribute in self.uses if of == name and attribute)


def changing(value: object) -> bool:
    """Whether this module, function or class answers another way another time."""
    if isinstance(value, ModuleType):
        name: object = value.__name__
    elif isinstance(value, (FunctionType, BuiltinFunctionType, MethodType, type)):
        if any(value is each for each in _ASKING):
            return True
        name = getattr(value, "__module__", None)
        if name == "builtins":
            return False
    else:
        return False
    return isinstance(name, str) and (name.partition(".")[0] in _CHANGING or name.startswith("numpy.random"))


def is_constant(module: str, attributes: list[str]) -> bool:
    """Whether these attributes of a module stay what they are while a program runs."""
    return bool(attributes) and all((module, each) in _CONSTANT for each in attributes)


@lru_cache(maxsize=4096)
def lookups(code: CodeType) -> Lookups:
    """What this code looks up."""
    uses, names, mentioned = set[tuple[str, str]](), set[str](), set[str]()
    imports, dynamic, own = list[Import](), list[tuple[str, ...] | None](), False
    attributes = set[str]()
    for each in _codes(code):
        steps = [step for step in dis.get_instructions(each) if step.opname not in _SILENT]
        mentioned |= {*each.co_names, *(text for text in each.co_consts if isinstance(text, str))}
        for at, step in enumerate(steps):
            loaded = _loaded(step)
            attributes |= {step.argval} if step.opname in _OF_AN_OBJECT else set()
            uses |= {(name, "") for name in loaded[:-1]}
            if loaded:
                uses.add((loaded[-1], _attribute(steps, at + 1)))
            if step.opname in _GLOBAL:
                names.add(step.argval)
                if step.argval == "getattr":
                    asked = _asked(steps, at + 1)
                    dynamic += [] if asked in ("constant", "self") else [asked if isinstance(asked, tuple) else None]
                    own |= asked == "self"
            if step.opname == "IMPORT_NAME":
                imports += _imports(steps, at)
    stored = {name for each in _codes(code) for step in dis.get_instructions(each) for name in _stored(step)}
    if own and "self" in stored:
        dynamic.append(None)
    by_any_name = own or bool(_BY_ANY_NAME & mentioned)
    inner = bool(_INNER & mentioned)
    return Lookups(
        *(frozenset(uses), frozenset(names), tuple(imports), tuple(dynamic)),
        *(frozenset(mentioned), by_any_name, inner, bool(_FILES & attributes)),
    )


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


def _loaded(step: dis.Instruction) -> tuple[str, ...]:
    """Names that an instruction loads: some load two at once."""
    if not step.opname.startswith(("LOAD_", "STORE_FAST_LOAD_FAST")) or step.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
        return ()
    if isinstance(step.argval, tuple):
        both = tuple(map(str, step.argval))
        return both if step.opname.startswith("LOAD_") else both[1:]
    return (step.argval,) if isinstance(step.argval, str) else ()


def _stored(step: dis.Instruction) -> tuple[str, ...]:
    """Names that an instruction binds."""
    if not step.opname.startswith(("STORE_FAST", "STORE_NAME", "STORE_GLOBAL", "STORE_DEREF")):
        return ()
    if isinstance(step.argval, tuple):
        both = tuple(map(str, step.argval))
        return both[:1] if step.opname.startswith("STORE_FAST_LOAD_FAST") else both
    return (str(step.argval),)


def _attribute(steps: list[dis.Instruction], at: int) -> str:
    """The attribute that is taken of what was loaded last, or ""."""
    return steps[at].argval if at < len(steps) and steps[at].opname in _OF_AN_OBJECT else ""


def _asked(steps: list[dis.Instruction], at: int) -> tuple[str, ...] | str:
    """What a `getattr` is asked of: "constant" for a name that the code shows, "self", a global, or "" for others."""
    loaded = _loaded(steps[at]) if at < len(steps) else ()
    if not loaded:
        return ""
    path, step = [loaded[0]], at + 1
    while len(loaded) == 1 and (attribute := _attribute(steps, step)):
        path.append(attribute)
        step += 1
    rest = [each.opname for each in steps[step : step + 3]]
    with_default = len(rest) == 3 and rest[1].startswith("LOAD_") and rest[2].startswith("CALL")
    if len(loaded) == 1 and rest[:1] == ["LOAD_CONST"] and (rest[1:2] == ["CALL"] or with_default):
        return "constant"
    if len(loaded) == 1 and not (rest and rest[0].startswith("LOAD_")):  # the object is computed, too
        return ""
    if loaded[0] == "self" and steps[at].opname not in _GLOBAL:
        return "self"
    return tuple(path) if steps[at].opname in _GLOBAL else ""


def _imports(steps: list[dis.Instruction], at: int) -> Iterator[Import]:
    """What an import binds."""
    module, level, taken = str(steps[at].argval), steps[at - 2].argval, steps[at - 1].argval
    if taken:
        for number in range(len(taken)):
            bound = _stored(steps[at + 2 + 2 * number])
            yield Import(module, level, str(taken[number]), bound[0] if bound else "")
        return
    after = at + 1
    while after < len(steps) and steps[after].opname in ("IMPORT_FROM", "SWAP", "ROT_TWO", "POP_TOP"):
        after += 1
    bound = _stored(steps[after]) if after < len(steps) else ()
    # Without a name of its own, `import a.b` binds a.
    yield Import(module if after > at + 1 else module.partition(".")[0], level, "", bound[0] if bound else "")
