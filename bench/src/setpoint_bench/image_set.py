"""An image set: pixels and labels of a Hugging Face data set of images, kept as arrays in the user's cache folder."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from setpoint_bench.data import cache_folder
from setpoint_bench.hub_data import columns_of, files_of, lacks
from setpoint_bench.images import Splits
from setpoint_bench.tensors import held_out


@dataclass(frozen=True)
class ImageSet:
    """A data set of the Hub with the splits "train" and "test", laid out as there in a data folder.

    Args:
        repository: its name on the Hub: `"uoft-cs/cifar10"`.
        column: the column that holds the images.
        mode: how they are decoded: "RGB" or "L".
        size: side in pixels to which square images are resized as they are decoded, or None for their own.
        validates: whether it has a split "validation"; else a fixed tenth of the training images validates.
    """

    repository: str
    column: str
    mode: str
    size: int | None = None
    validates: bool = False

    @property
    def name(self) -> str:
        return self.repository.rpartition("/")[2]

    @property
    def folder(self) -> str:
        return f"{self.repository}/data"

    def splits(self, data: Path | None) -> Splits:
        """8-bit images and labels of each split.

        Args:
            data: a data folder, or None for the usual places.

        Raises:
            BenchError: it is neither here nor to be had.
        """
        arrays = {name: torch.from_numpy(array) for name, array in self.arrays(data).items()}
        splits = {split: (arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in self._stored}
        if not self.validates:
            splits["train"], splits["validation"] = held_out(splits["train"])
        return splits

    @property
    def _stored(self) -> tuple[str, ...]:
        return ("train", "validation", "test") if self.validates else ("train", "test")

    def arrays(self, data: Path | None) -> Mapping[str, np.ndarray]:
        """Decoded images and labels, from the user's cache folder if they are there."""
        files = files_of(self.repository, data, self._stored)
        sizes = "-".join(str(file.stat().st_size) for file in files) or "hub"
        resized = f"-{self.size}px" if self.size else ""
        cached = cache_folder() / f"{self.name}-{sizes}{resized}.npz"
        if cached.exists():
            with np.load(cached) as arrays:
                return dict(arrays)
        arrays = {}
        for split in self._stored:
            rows = columns_of(self.repository, split, (self.column, "label"), data, image=self.column)
            images = self._decoded(rows[self.column])
            arrays[f"{split}_images"], arrays[f"{split}_labels"] = images, np.asarray(rows["label"], dtype=np.int64)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, suffix=".npz", delete=False) as file:
            np.savez(file, **arrays)
        os.replace(file.name, cached)
        return arrays

    def _decoded(self, compressed: Iterable[bytes]) -> UInt8[np.ndarray, "count channels height width"]:
        try:
            from PIL import Image
        except ImportError as error:
            raise lacks(self.name, "pillow") from error
        images = []
        for content in compressed:
            image = Image.open(io.BytesIO(content)).convert(self.mode)
            if self.size:
                image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
            pixels = np.asarray(image, dtype=np.uint8)
            images.append(pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None])
        return np.stack(images)
