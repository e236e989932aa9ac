"""An image set: pixels and labels of a Hugging Face data set of images, kept as arrays in the user's cache folder."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from setpoint_bench.data import cache_folder, find_data, missing
from setpoint_bench.images import Splits
from setpoint_bench.task import BenchError
from setpoint_bench.tensors import held_out


@dataclass(frozen=True)
class ImageSet:
    """A data set of the Hub with the splits "train" and "test", laid out as there in a data folder.

    Args:
        repository: its name on the Hub: `"uoft-cs/cifar10"`.
        column: the column that holds the images.
        mode: how they are decoded: "RGB" or "L".
    """

    repository: str
    column: str
    mode: str

    @property
    def name(self) -> str:
        """The last part of the repository's name."""
        return self.repository.rpartition("/")[2]

    @property
    def folder(self) -> str:
        """Where its files lie in a data folder."""
        return f"{self.repository}/data"

    def splits(self, data: Path | None) -> Splits:
        """8-bit images and labels of each split; a fixed tenth of the training images validates.

        Args:
            data: a data folder, or None for the usual places.

        Raises:
            BenchError: it is neither here nor to be had.
        """
        arrays = {name: torch.from_numpy(array) for name, array in self.arrays(data).items()}
        train, validation = held_out((arrays["train_images"], arrays["train_labels"]))
        return {"train": train, "validation": validation, "test": (arrays["test_images"], arrays["test_labels"])}

    def arrays(self, data: Path | None) -> Mapping[str, np.ndarray]:
        """Decoded images and labels, from the user's cache folder if they are there."""
        folder = find_data(self.folder, data)
        files = [] if folder is None else self._files(folder)
        sizes = "-".join(str(file.stat().st_size) for file in files) or "hub"
        cached = cache_folder() / f"{self.name}-{sizes}.npz"
        if cached.exists():
            with np.load(cached) as arrays:
                return dict(arrays)
        arrays = {}
        for split in ("train", "test"):
            rows = self._from_hub(split) if folder is None else self._from_folder(folder, split)
            arrays[f"{split}_images"], arrays[f"{split}_labels"] = self._decoded(rows)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, suffix=".npz", delete=False) as file:
            np.savez(file, **arrays)
        os.replace(file.name, cached)
        return arrays

    def _files(self, folder: Path) -> list[Path]:
        """The parquet files of a folder, which holds both splits."""
        files = sorted(folder.glob("*.parquet"))
        for split in ("train", "test"):
            if not any(file.name.startswith(f"{split}-") for file in files):
                raise BenchError(
                    f"no {split}-*.parquet in {folder}: put the files of "
                    f"https://huggingface.co/datasets/{self.repository}/tree/main/data there, or name no folder that "
                    f"has {self.folder}, then they are downloaded"
                )
        return files

    def _decoded(
        self, rows: Iterable[tuple[bytes, int]]
    ) -> tuple[UInt8[np.ndarray, "count channels height width"], np.ndarray]:
        """Compressed images and labels as arrays."""
        try:
            from PIL import Image
        except ImportError as error:
            raise self._lacks("pillow") from error
        images, labels = [], []
        for content, label in rows:
            pixels = np.asarray(Image.open(io.BytesIO(content)).convert(self.mode), dtype=np.uint8)
            images.append(pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None])
            labels.append(label)
        return np.stack(images), np.asarray(labels, dtype=np.int64)

    def _from_folder(self, folder: Path, split: str) -> Iterator[tuple[bytes, int]]:
        """Rows of the split's parquet files."""
        try:
            parquet: Any = import_module("pyarrow.parquet")
        except ImportError as error:
            raise self._lacks("pyarrow") from error
        for file in sorted(folder.glob(f"{split}-*.parquet")):
            table = parquet.read_table(file)
            for image, label in zip(table[self.column].to_pylist(), table["label"].to_pylist(), strict=True):
                yield image["bytes"], label

    def _from_hub(self, split: str) -> Iterator[tuple[bytes, int]]:
        """Rows of the split on the Hugging Face Hub."""
        try:
            import datasets
        except ImportError as error:
            raise missing(self.folder, str(self._lacks("datasets"))) from error
        try:
            rows: Any = datasets.load_dataset(self.repository, split=split)
        except (OSError, RuntimeError, ValueError) as error:
            raise missing(self.folder, f"{type(error).__name__}: {error}") from error
        rows = rows.cast_column(self.column, datasets.Image(decode=False))
        for row in rows:
            yield row[self.column]["bytes"], row["label"]

    def _lacks(self, package: str) -> BenchError:
        return BenchError(f"the {self.name} data need {package}: pip install setpoint-bench")
