"""Data sets of the Hugging Face Hub: parquet files in a data folder, else a download by the package `datasets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from setpoint_bench.data import find_data, missing
from setpoint_bench.task import BenchError

SPLITS = ("train", "test")


def files_of(repository: str, data: Path | None, splits: Sequence[str] = SPLITS) -> list[Path]:
    """The parquet files of a data set, or none where only a download can help.

    Raises:
        BenchError: a folder is there that lacks a split.
    """
    folder = find_data(f"{repository}/data", data)
    if folder is None:
        return []
    files = sorted(folder.glob("*.parquet"))
    for split in splits:
        if not any(file.name.startswith(f"{split}-") for file in files):
            raise BenchError(
                f"no {split}-*.parquet in {folder}: put the files of "
                f"https://huggingface.co/datasets/{repository}/tree/main/data there, or name no folder that "
                f"has {repository}/data, then they are downloaded"
            )
    return files


def columns_of(
    repository: str, split: str, columns: Sequence[str], data: Path | None, image: str | None = None
) -> Mapping[str, list[Any]]:
    """The named columns of a split.

    Raises:
        BenchError: the data are neither here nor to be had, or a package that reads them is missing.
    """
    files = [file for file in files_of(repository, data, (split,)) if file.name.startswith(f"{split}-")]
    if files:
        parquet = _package("pyarrow.parquet", repository)
        tables = [parquet.read_table(file, columns=list(columns)).to_pydict() for file in files]
        read = {column: [value for table in tables for value in table[column]] for column in columns}
    else:
        read = _downloaded(repository, split, columns, image)
    if image is not None:
        read[image] = [value["bytes"] for value in read[image]]
    return read


def _downloaded(repository: str, split: str, columns: Sequence[str], image: str | None) -> dict[str, list[Any]]:
    folder = f"{repository}/data"
    try:
        datasets = _package("datasets", repository)
        rows = datasets.load_dataset(repository, split=split)
    except (BenchError, OSError, RuntimeError, ValueError) as error:
        raise missing(
            folder, str(error) if isinstance(error, BenchError) else f"{type(error).__name__}: {error}"
        ) from error
    if image is not None:
        rows = rows.cast_column(image, datasets.Image(decode=False))
    return {column: list(rows[column]) for column in columns}


def _package(name: str, repository: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise lacks(repository.rpartition("/")[2], package) from error


def lacks(data: str, package: str) -> BenchError:
    """The error for a package without which data cannot be read."""
    return BenchError(f"the {data} data need {package}: pip install setpoint-bench")
