"""Engines that train on several ranks, each seen on two of them; those that are not installed are left out."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "4")
RUNS = {  # by name: the package, the script and its arguments, and what each rank says at its end
    "Accelerate, DDP": ("accelerate", "accelerate_ranks.py", "ddp", "alike"),
    "Accelerate, FSDP2": ("accelerate", "accelerate_ranks.py", "fsdp2", "alike"),
    "Trainer, FSDP2": ("transformers", "trainer_fsdp.py", "", "trained"),
    "Lightning, FSDP2": ("lightning", "lightning_model_parallel.py", "dp", "trained"),
    "Lightning, tensor parallelism": ("lightning", "lightning_model_parallel.py", "tp", "trained"),
    "DeepSpeed, ZeRO-1": ("deepspeed", "deepspeed_ranks.py", "1", "refused"),
    "DeepSpeed, ZeRO-2": ("deepspeed", "deepspeed_ranks.py", "2", "refused"),
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="there is no gloo")]


def said(*command: str) -> str:
    """What a command says, which has some minutes."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, "-W", "ignore", *command]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=900, env=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", RUNS)
def test_an_engine_on_two_ranks(name: str, tmp_path: Path) -> None:
    """Claim: it trains to a budget, or is refused by name on both ranks; Accelerate resumes bit for bit."""
    package, script, argument, end = RUNS[name]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    folder = () if package == "deepspeed" else (str(tmp_path),)
    assert said(*TORCHRUN, str(HERE / script), *folder, *filter(None, [argument])).count(end) == 2


def test_ray_train(tmp_path: Path) -> None:
    """Claim: a run of TorchTrainer of which a worker is killed ends as the one that nobody stopped."""
    pytest.importorskip("ray")
    assert "alike" in said(str(HERE / "ray_ranks.py"), str(tmp_path))


def test_torchrun_restarts(tmp_path: Path) -> None:
    """Claim: a group that torchrun starts again from the last file ends with the same ledger, to the byte."""
    for name in ("whole", "killed"):
        text = said(*TORCHRUN, str(HERE / "elastic.py"), str(tmp_path), name)
        assert ("continues from step" in text) == (name == "killed")
    whole, killed = ((tmp_path / f"{name}.ledger").read_bytes() for name in ("whole", "killed"))
    assert whole == killed and (tmp_path / "mark").exists()
