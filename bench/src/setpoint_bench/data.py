"""Where benchmark data lie on this machine, and where decoded copies of them are kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setpoint_bench.task import BenchError


def cache_folder() -> Path:
    """The user's cache folder for Setpoint, by the platform's custom; it need not exist yet."""
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "setpoint" / "cache"
    if sys.platform == "darwin" and not os.environ.get("XDG_CACHE_HOME"):
        return Path.home() / "Library" / "Caches" / "setpoint"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "setpoint"


def find_data(relative: str, given: Path | None = None) -> Path | None:
    """Path of `relative` in the data folder, or None where only a download can help.

    The data folder is `given`, else `$SETPOINT_DATA`, else `../shared/data` next to the checkout or
    to the working directory. A folder that was named but lacks the data is an error: nothing else is tried.

    Args:
        relative: path inside the folder, laid out like the Hugging Face Hub: `"uoft-cs/cifar10/data"`.
        given: the user's own choice of folder.

    Raises:
        BenchError: the named folder lacks the data.
    """
    named = given or (Path(os.environ["SETPOINT_DATA"]) if os.environ.get("SETPOINT_DATA") else None)
    if named is not None:
        if (named / relative).exists():
            return named / relative
        source = "--data" if given else "SETPOINT_DATA"
        raise BenchError(
            f"no {relative} in {named} (from {source}): name a folder that is laid out like the Hugging Face Hub and "
            "holds it, or leave it out, then it is looked for next to the checkout and downloaded; the data are "
            f"those of https://huggingface.co/datasets/{'/'.join(relative.split('/')[:2])}"
        )
    found = (folder / relative for folder in usual_folders() if (folder / relative).exists())
    return next(found, None)


def usual_folders() -> tuple[Path, ...]:
    """Folders looked in when none is named."""
    checkout = Path(__file__).resolve().parents[3]
    folders = (checkout.parent / "shared" / "data", Path.cwd().parent / "shared" / "data")
    return tuple(dict.fromkeys(folders))


def missing(relative: str, why: str) -> BenchError:
    """The error for data that are neither here nor to be had."""
    looked = ", ".join(str(folder / relative) for folder in usual_folders())
    return BenchError(
        f"cannot find {relative}: looked in {looked}, then tried to download it: {why}. "
        f"Pass --data DIR or set SETPOINT_DATA to a folder that holds {relative}"
    )
