"""Ultralytics: a YOLO that prunes itself; with the real package, where it is installed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from setpoint.errors import LoopError

os.environ["YOLO_OFFLINE"] = "true"  # it looks for news as it is imported
ultralytics = pytest.importorskip("ultralytics")

from setpoint.integrations.ultralytics import Pruning, add  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of noise, with two boxes in each."""
    folder = tmp_path_factory.mktemp("yolo")
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for number in range(8):
        Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"images/{number}.png")
        (folder / f"labels/{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n1 0.3 0.3 0.2 0.2\n")
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {{0: a, 1: b}}\n")
    return folder


def settings(folder: Path) -> dict[str, Any]:
    """Of a short run, with accumulation and warm-up."""
    return {
        "data": str(folder / "data.yaml"),
        "epochs": 6,
        "imgsz": SIZE,
        "batch": 4,
        "nbs": 8,
        "device": "cpu",
        "workers": 0,
        "project": str(folder / "runs"),
        "exist_ok": True,
        "plots": False,
        "amp": False,
        "optimizer": "AdamW",
        "save_period": 1,
    }


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Pruning, list[bool]]:
    """A run, and for each batch after a cut whether the average has the model's shapes and has moved."""
    model = ultralytics.YOLO("yolov8n.yaml")
    pruning, alive, before = add(model, 0.6, verify=False), list[bool](), dict[str, torch.Tensor]()

    def watch(trainer: Any) -> None:
        live = dict(trainer.model.named_parameters())
        for name, tensor in trainer.ema.ema.named_parameters():
            same = tensor.shape == live[name].shape
            moved = name not in before or before[name].shape != tensor.shape or not torch.equal(before[name], tensor)
            if name.endswith("conv.weight") and live[name].requires_grad:
                alive.append(same and (moved or pruning.loop.step in steps))
            before[name] = tensor.detach().clone()
        steps.add(pruning.loop.step)

    steps = set[int]()
    model.add_callback("on_train_batch_end", watch)
    model.train(**settings(folder))
    return pruning, alive


def test_one_line_meets_the_budget_with_a_live_average(trained: tuple[Pruning, list[bool]]) -> None:
    """Claim: steps are counted as the trainer makes them, and its average goes on at the smaller model's widths."""
    pruning, alive = trained
    assert pruning.summary is not None and pruning.summary.budget_met and pruning.summary.resizes
    assert pruning.summary.steps == pruning.summary.total_steps
    assert alive and all(alive)


def test_a_run_goes_on_from_its_file(trained: tuple[Pruning, list[bool]], folder: Path) -> None:
    """Claim: train(resume=True) goes on at the widths and the step of the file; an average is what ultralytics keeps,
    so that weights are not those of the uninterrupted run.
    """
    pruning, _ = trained
    weights = folder / "runs/train/weights"
    model = ultralytics.YOLO(str(weights / "epoch2.pt"))
    resumed = add(model, 0.6, verify=False)
    model.train(resume=True, save_dir=str(folder / "resumed"))
    assert resumed.loop is not None and pruning.loop is not None and resumed.summary is not None
    assert resumed.summary.budget_met and resumed.summary.steps == pruning.summary.steps
    cuts = [entry.step for entry in pruning.loop.ledger if entry.dropped]
    if max(cuts) <= 3:  # all before the file
        assert resumed.loop.widths == pruning.loop.widths


def test_its_files_predict_and_export(trained: tuple[Pruning, list[bool]], folder: Path) -> None:
    """Claim: a file is read by YOLO(...), predicts, and gives an ONNX file of equal outputs."""
    onnxruntime = pytest.importorskip("onnxruntime")
    best = str(folder / "runs/train/weights/best.pt")
    images = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    model = ultralytics.YOLO(best)
    want = model.model.eval()(images)[0]
    dense = sum(each.numel() for each in ultralytics.YOLO("yolov8n.yaml").model.parameters())
    assert sum(each.numel() for each in model.model.parameters()) < 0.8 * dense
    assert len(model.predict(images, device="cpu", verbose=False)) == 1
    session = onnxruntime.InferenceSession(ultralytics.YOLO(best).export(format="onnx", imgsz=SIZE, simplify=False))
    (found, *_) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert torch.allclose(torch.from_numpy(found), want, atol=1e-3)


def test_adding_twice_is_refused() -> None:
    """Claim: two budgets of one model are named before anything is trained."""
    model = ultralytics.YOLO("yolov8n.yaml")
    add(model, 0.6)
    with pytest.raises(LoopError, match="pruned already"):
        add(model, 0.5)
