"""Fourier transforms, and complex numbers as pairs: the dim that is transformed freezes, the others pass."""

from __future__ import annotations

from typing import Any

import torch

from setpoint.groups.walk import DimLabels, Value, Walk, op_name, rule

aten = torch.ops.aten


def _transform(walk: Walk, out: Value, x: Value, size: Any = None, dim: Any = None, *args: Any) -> Value:
    """Every entry of the result needs every entry along the dim."""
    if dim is None:
        kind = op_name(walk.node.target)  # type: ignore[union-attr]
        last = 2 if kind.endswith("2") else 1 if not kind.endswith("n") else len(size) if size else x.ndim
        dim = range(-last, 0)
    dims = {d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)}
    for d in dims:
        walk.freeze(x.labels[d], "a Fourier transform runs over this dim")
    return Value(out.shape, tuple(None if d in dims else own for d, own in enumerate(x.labels)), zero=x.zero)


for _name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
    for _suffix in ("", "2", "n"):
        if hasattr(aten, f"fft_{_name}{_suffix}"):
            rule(getattr(aten, f"fft_{_name}{_suffix}").default)(_transform)


@rule(aten.view_as_complex.default)
def _view_as_complex(walk: Walk, out: Value, x: Value) -> tuple[DimLabels, ...]:
    """Pairs along the last dim become numbers."""
    walk.freeze(x.labels[-1], "this dim holds the two parts of a complex number")
    return x.labels[:-1]


@rule(aten.view_as_real.default)
def _view_as_real(walk: Walk, out: Value, x: Value) -> tuple[DimLabels, ...]:
    """Numbers become pairs along a new last dim."""
    return (*x.labels, None)
