"""The device a benchmark runs on, and the type its products are computed in there."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, which is about twice as fast; else float32.

    Read from the capabilities, not from a stopwatch, so that the same machine always answers alike.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
