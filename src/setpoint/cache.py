"""The cache: what was found out about a model, in the user's cache folder, so that it need not be found out again."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from setpoint.errors import UsageError
from setpoint.files import replace_text

_ON, _OFF = ("", "on", "1", "yes", "true"), ("off", "0", "no", "false")
FORMAT = 1
_MOST = 500
"""Files that are kept; those that were not used for the longest time make room."""


def cache_folder() -> Path:
    """The user's cache folder for Setpoint, by the platform's custom; it need not exist yet.

    Raises:
        FileNotFoundError: the user has no home, and nothing else says where the folder is.
    """
    try:
        return _cache_folder()
    except RuntimeError as error:
        raise FileNotFoundError(f"there is no cache folder: {error}") from error


def _cache_folder() -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "setpoint" / "cache"
    if sys.platform == "darwin" and not os.environ.get("XDG_CACHE_HOME"):
        return Path.home() / "Library" / "Caches" / "setpoint"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "setpoint"


_REMEMBERS: ContextVar[bool] = ContextVar("_REMEMBERS", default=True)


@contextmanager
def remembering(does: bool) -> Iterator[None]:
    """Inside, what was kept before is used, or is found out anew; what is found is kept all the same."""
    token = _REMEMBERS.set(does)
    try:
        yield
    finally:
        _REMEMBERS.reset(token)


def keeps() -> bool:
    """Whether anything is kept: `SETPOINT_CACHE=off` turns it off.

    Raises:
        UsageError: the variable says neither on nor off.
    """
    said = os.environ.get("SETPOINT_CACHE", "").lower()
    if said not in (*_ON, *_OFF):
        raise UsageError(
            f"SETPOINT_CACHE is 'on' or 'off', got {said!r}: XDG_CACHE_HOME says in which folder the cache lies"
        )
    return said in _ON


def recall(key: str) -> Any:
    """What was kept under a key, which is a digest; None if nothing was, or what is there is damaged or another's."""
    if not key or not keeps() or not _REMEMBERS.get():
        return None
    try:
        file = _file(key)
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] == FORMAT and content["key"] == key and content["digest"] == digest_of(content["facts"]):
            with suppress(OSError):  # the folder may be for reading only
                os.utime(file)
            return content["facts"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def keep(key: str, facts: Any) -> None:
    """Keep facts, made of JSON's own kinds, under a key; a folder that cannot be written to costs the next run time."""
    if not key or not keeps():
        return
    content = {"format": FORMAT, "key": key, "digest": digest_of(facts), "facts": facts}
    with suppress(OSError):
        replace_file(_file(key), content)


def replace_file(file: Path, content: Any) -> None:
    """Write content, made of JSON's own kinds, to a file at once: a reader sees a complete file or none.

    Of two writers the last one wins.

    Raises:
        OSError: if the folder cannot be written to; then nothing stays behind.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # another may have removed a file meanwhile
        _make_room(file)
    replace_text(file, json.dumps(content))


def _file(key: str) -> Path:
    return cache_folder() / "attach" / f"{key}.json"


def digest_of(facts: Any) -> str:
    """A digest of facts made of JSON's own kinds."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _make_room(file: Path) -> None:
    """Remove the oldest files beside this one, which is about to be written."""
    files = [(each.stat().st_mtime, each) for each in file.parent.iterdir() if each != file]
    for _, each in sorted(files)[: max(0, len(files) - _MOST + 1)]:
        each.unlink(missing_ok=True)
