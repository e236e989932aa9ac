"""The tasks: data, shapes, determinism, and models of every width."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from setpoint.bench import cifar10, shakespeare
from setpoint.bench.catalogue import TASKS, task_named
from setpoint.bench.cifar10 import Cifar10
from setpoint.bench.digits import Digits
from setpoint.bench.images import shuffled_batches
from setpoint.bench.shakespeare import Shakespeare
from setpoint.bench.task import BenchError, Task, dense_widths, split_named, warm_up_cosine

TEXT = "To be, or not to be: that is the question.\n" * 200


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a small Shakespeare, and a cache folder of its own."""
    folder = tmp_path / "data"
    file = folder / shakespeare.FILE
    file.parent.mkdir(parents=True)
    file.write_text(TEXT, encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def cifar(data: Path) -> Path:
    """The data folder, with a small CIFAR-10 in it: 20 images to train on and 10 to test on."""
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    folder = data / cifar10.FOLDER
    folder.mkdir(parents=True)
    for split, count in (("train", 20), ("test", 10)):
        rows = [{"bytes": _png(shade=number), "path": None} for number in range(count)]
        table = arrow.table({"img": rows, "label": [number % 10 for number in range(count)]})
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return data


def _png(shade: int) -> bytes:
    """A 32x32 image in one colour."""
    import io

    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.fromarray(np.full((32, 32, 3), shade, dtype=np.uint8)).save(file, format="png")
    return file.getvalue()


def check_task(task: Task) -> None:
    """Batches fit the model, the same seed gives the same batches and weights, and training moves the loss."""
    torch.manual_seed(3)
    model = task.build(dense_widths(task))
    torch.manual_seed(3)
    twin = task.build(dense_widths(task))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    first, again, other = (next(task.batches(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == task.example()[0].shape
    assert first[0].dtype == task.example()[0].dtype
    assert first[0].is_contiguous(memory_format=torch.channels_last) or first[0].dim() != 4
    assert bool(torch.isfinite(task.loss(model, *first)))
    assert len(task.optimizer(model).state_dict()["param_groups"][0]["params"]) > 0


def test_digits() -> None:
    """The digits task loads, repeats itself, and its splits share no image."""
    task = Digits(epochs=1, width=4)
    check_task(task)
    score = task.evaluate(task.build(dense_widths(task)), "test")
    assert score.accuracy is not None
    assert 0 <= score.accuracy <= 1
    assert task.steps == 15


def test_digits_are_learnt() -> None:
    """Four epochs of a narrow model read most of the validation digits."""
    task = Digits(epochs=4, width=16)
    model = task.build(dense_widths(task))
    optimizer = task.optimizer(model)
    schedule = task.schedule(optimizer)
    for inputs, targets in islice(task.batches(0), task.steps):
        task.loss(model, inputs, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    score = task.evaluate(model, "validation")
    assert score.accuracy is not None
    assert score.accuracy > 0.8
    assert model.training


def test_shakespeare(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Shakespeare task loads, repeats itself, and its score is the mean over all windows."""
    monkeypatch.setattr(shakespeare, "BATCH", 2)
    monkeypatch.setattr(shakespeare, "NUM_WINDOWS", 4)
    task = Shakespeare(steps=3, data=data)
    check_task(task)
    widths = {name: dimension.multiple_of for name, dimension in task.dimensions.items()}
    model = task.build(widths)
    score = task.evaluate(model, "validation")
    text = shakespeare._corpus(data).splits["validation"]
    starts = torch.linspace(0, len(text) - shakespeare.BLOCK - 1, 4).long()
    assert score.accuracy is None
    assert score.loss == pytest.approx(float(task.loss(model, *shakespeare._windows(text, starts)).detach()), rel=1e-2)


def test_shakespeare_targets_follow_inputs(data: Path) -> None:
    """Each target is the character after its input."""
    inputs, targets = next(Shakespeare(data=data).batches(0))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_cifar10(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CIFAR-10 task decodes once, keeps the arrays in the cache, and repeats itself."""
    monkeypatch.setattr(cifar10, "BATCH", 4)
    monkeypatch.setattr(cifar10, "WIDTHS", (4, 4, 4, 4, 4, 4))
    task = Cifar10(data=cifar)
    check_task(task)
    assert len(list((cifar.parent / "cache" / "setpoint").glob("cifar10-*.npz"))) == 1
    monkeypatch.setattr(cifar10, "_decode", lambda rows: pytest.fail("decoded twice"))
    cifar10._splits.cache_clear()
    assert len(cifar10._splits(cifar)["validation"][0]) == 2
    assert task.evaluate(task.build(dense_widths(task)), "test").accuracy is not None


def test_cifar10_pixels_survive(cifar: Path) -> None:
    """Decoded images are the stored ones, colour first."""
    arrays = cifar10._arrays(cifar)
    assert arrays["train_images"].shape == (20, 3, 32, 32)
    assert [int(image.max()) for image in arrays["train_images"]] == list(range(20))
    assert arrays["test_labels"].tolist() == list(range(10))


@pytest.mark.parametrize("name", ["cifar10", "shakespeare"])
def test_missing_data(name: str, tmp_path: Path) -> None:
    """A named folder without the data is an error that names folder and option."""
    with pytest.raises(BenchError, match=r"from --data"):
        next(task_named(name, data=tmp_path).batches(0))


def test_missing_data_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variable names the folder too, and the error names the variable."""
    monkeypatch.setenv("SETPOINT_DATA", str(tmp_path))
    shakespeare._corpus.cache_clear()
    with pytest.raises(BenchError, match="SETPOINT_DATA"):
        next(Shakespeare().batches(0))


def test_download_that_fails_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without data and network the error lists the folders and what to set."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shakespeare, "ADDRESS", (tmp_path / "nothing").as_uri())
    with pytest.raises(BenchError, match=r"looked in .*shared.*SETPOINT_DATA"):
        shakespeare._download()


def test_shifted_images_move_by_whole_pixels() -> None:
    """Augmentation moves the only bright pixel by at most the shift, and both mirrors occur."""
    images = torch.zeros(200, 1, 7, 9)
    images[:, :, 3, 2] = 1
    batch, _ = next(shuffled_batches(images, torch.zeros(200).long(), batch=200, seed=0, shift=1, flip=True))
    rows, columns = batch[:, 0].nonzero()[:, 1], batch[:, 0].nonzero()[:, 2]
    assert batch.shape == images.shape
    assert set(rows.tolist()) == {2, 3, 4}
    assert set(columns.tolist()) == {1, 2, 3, 5, 6, 7}


def test_every_image_once_per_epoch() -> None:
    """An epoch holds each image once."""
    images = torch.arange(12.0).view(12, 1, 1, 1)
    stream = shuffled_batches(images, torch.arange(12), batch=4, seed=0, shift=0, flip=False)
    labels = torch.cat([y for _, y in islice(stream, 3)])
    assert sorted(labels.tolist()) == list(range(12))


def test_schedule_rises_and_falls() -> None:
    """The rate rises linearly to its peak and ends near the floor."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = warm_up_cosine(optimizer, steps=100, warm_up=0.1, floor=0.1)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(rates) == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2, rel=0.01)


def test_unknown_names_list_the_known() -> None:
    """An unknown task or split is an error that lists those there are."""
    with pytest.raises(BenchError, match=", ".join(TASKS)):
        task_named("imagenet")
    with pytest.raises(BenchError, match="validation or test"):
        split_named("train")


@pytest.mark.parametrize(
    ("name", "epochs", "steps"), [("shakespeare", 1, None), ("digits", None, 5), ("digits", 0, None)]
)
def test_length_in_the_wrong_unit(name: str, epochs: int | None, steps: int | None) -> None:
    """A length in the task's wrong unit, or below 1, is an error."""
    with pytest.raises(BenchError, match="--"):
        task_named(name, epochs=epochs, steps=steps)
