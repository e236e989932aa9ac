"""The language task without its weights: text whose held-out files stay out, windows of it, and any widths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from setpoint_bench.catalogue import task_named
from setpoint_bench.installed_text import installed_text
from setpoint_bench.simple_task import dense_widths
from setpoint_bench.task import BenchError
from setpoint_bench.tasks import smollm2


def test_no_file_is_in_two_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a file that occurs twice is read once, every file is in one split, and too short ones in none."""
    folder = tmp_path / "written_for_this_test"
    folder.mkdir()
    for number in range(64):
        for copy in ("a", "b"):
            (folder / f"{copy}{number}.py").write_text(f"# {number}\n" * 700, encoding="utf-8")
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    splits = installed_text(["written_for_this_test"])
    files = [each for split in splits.values() for each in split]
    assert len(files) == len(set(files)) == 64 and all(splits.values())
    with pytest.raises(BenchError, match="install it"):
        installed_text(["none_such"])


def test_windows_of_held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: training windows come from training tokens alone, judged ones are spread over their split."""
    tokens = {"train": torch.arange(1000), "validation": torch.arange(5000, 6000), "test": torch.arange(7000, 8000)}
    monkeypatch.setattr(smollm2, "domain", lambda: tokens)
    windows = smollm2.TokenWindows(16)
    x, y = next(windows.batches(4, seed=0))
    assert x.shape == (4, 16) and int(x.max()) < 1000 and torch.equal(y, x + 1)
    x, y = windows.split("test")
    assert int(x.min()) == 7000 and int(y.max()) == 7999 and torch.equal(y, x + 1)


def test_widths_of_its_own_in_each_layer() -> None:
    """Claim: heads and neurons of a layer are those asked for."""
    task = task_named("smollm2")
    widths = {**dense_widths(task), "layer2.heads": 1, "layer3.neurons": 64}
    model = task.build(widths, torch.device("meta"))
    assert model.get_parameter("network.model.layers.1.self_attn.q_proj.weight").shape == (192, 576)
    assert model.get_parameter("network.model.layers.2.mlp.down_proj.weight").shape == (576, 64)
    assert model(torch.zeros(2, 5, dtype=torch.long, device="meta")).shape == (2, 5, smollm2.VOCABULARY)
