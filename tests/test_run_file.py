"""Run files and checkpoints: whole or not at all, never code, never half loaded."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import random
import sys
import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import nn
from torch.utils._pytree import tree_leaves

import setpoint
from loop.test_regrowth import BACK, DROP, Net, Scripted, dear
from loop.test_state import Run, assert_untouched, snapshot, tensors
from setpoint.checkpoint.model_file import read_file, write_file
from setpoint.checkpoint.plain import TREE, from_tensors, to_tensors
from setpoint.cli import report as report_of
from setpoint.errors import CheckpointError, ReportError, SetpointError
from setpoint.report.record import read_ledger

__all__ = ["dear"]


def run(**options: Any) -> Run:
    return Run(lambda: Scripted(DROP, BACK), **{"budget": 0.9, "verify": False, **options})


def parts(one: Run) -> dict[str, Any]:
    """All of a run that has a state, the loop last: load_run brings them into order."""
    named = {"optimizer": one.optimizers[0], "scheduler": one.schedulers[0]}
    return {"model": one.model, "ema": one.ema, **named, "loop": one.loop}


def test_a_run_goes_on_from_a_file(dear: None, tmp_path: Path) -> None:
    """Claim: what comes after load_run is bit-equal to the uninterrupted run; plain data come back as they were."""
    whole = run()
    losses = whole.train(0, 22)
    random_state = torch.get_rng_state()
    setpoint.save_run(tmp_path / "run", **parts(whole), losses=losses, rng=random_state, note=("a", None))
    again = run()
    rest = setpoint.load_run(tmp_path / "run", **parts(again))
    assert rest["losses"] == losses and torch.equal(rest["rng"], random_state) and rest["note"] == ("a", None)
    assert again.train(22, 40) == whole.train(22, 40)
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(again), strict=True))


@pytest.mark.parametrize("through", ["save_run", "torch.save"])
def test_chance_goes_on(through: str, dear: None, tmp_path: Path) -> None:
    """Claim: after a resume PyTorch, NumPy and Python draw what they would have drawn in the uninterrupted run."""

    def draws() -> tuple[Any, ...]:
        # Python's generator is asked for the second half of a pair only: the type checker of the tests draws from it.
        return torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1)

    one, again = run(), run()
    one.train(0, 3)
    np.random.standard_normal(), random.gauss(0, 1)  # leaves each with half a pair in hand
    if through == "save_run":
        setpoint.save_run(tmp_path / "run", **parts(one))
    else:
        torch.save(one.loop.state_dict(), tmp_path / "run")
    expected = draws()
    if through == "save_run":
        setpoint.load_run(tmp_path / "run", **parts(again))
    else:
        again.loop.load_state_dict(torch.load(tmp_path / "run", weights_only=True))
    assert draws() == expected


def test_a_tree_comes_back_as_it_was() -> None:
    """Claim: every kind of value that state dicts hold survives, tensors with their strides and dtypes."""
    wide = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    value = {
        "state": OrderedDict({0: {"step": torch.tensor(3.0), "exp_avg": wide}, 7: {}}),
        "floats": [0.1, -0.0, 1e300, float("inf"), True, None, 2**70],
        "nested": ({"a": ()}, [[]], "tree"),
        "milestones": Counter({3: 1, 5: 2}),
        "arrays": [np.arange(6, dtype=np.uint32).reshape(2, 3), np.zeros((0, 2)), np.array(1.5, dtype=np.float32)],
        "dtypes": [torch.zeros(2, dtype=each) for each in (torch.bfloat16, torch.bool, torch.uint8, torch.complex64)],
        "odd": [
            torch.randn(6)[::2],
            torch.zeros(3).expand(2, 3),
            torch.zeros(0, 3),
            torch.randn(3, 1, 4).permute(2, 0, 1),
        ],
        "wide": [torch.randn(11, dtype=torch.complex128), torch.randn(1, dtype=torch.float64)],
    }
    again = from_tensors(to_tensors(value))

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            dense = a.stride() == b.stride() or not a.is_contiguous()
            return a.dtype == b.dtype and torch.equal(a, b) and dense
        if isinstance(a, np.ndarray):
            return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
        if isinstance(a, dict):
            return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)):
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        return type(a) is type(b) and repr(a) == repr(b)

    assert repr(from_tensors(to_tensors([np.float64(0.1), np.int64(3), np.bool_(True)]))) == "[0.1, 3, True]"
    assert same(value, again) and again["state"][0]["exp_avg"].stride() == wide.stride()
    assert len(to_tensors({"a": wide, "b": wide})) == 2


def test_views_of_one_memory_are_told_apart() -> None:
    """Claim: a conjugate or negated view is not taken for the tensor whose memory it shares; odd arrays are refused."""
    x = torch.randn(3, dtype=torch.complex64)
    value = {"x": x, "conjugate": x.conj(), "imag": x.imag, "negated": x.conj().imag, "again": x}
    again = from_tensors(to_tensors(value))
    assert all(torch.equal(again[name], each) for name, each in value.items())
    assert from_tensors(to_tensors(np.arange(6)[::-1])).tolist() == [5, 4, 3, 2, 1, 0]
    for odd in (np.ma.masked_array([1, 2], [0, 1]), np.arange(3, dtype=">i4"), np.array(["a"])):
        with pytest.raises(CheckpointError, match=f"of {odd.dtype}"):
            to_tensors(odd)


@pytest.mark.parametrize("value", [{1, 2}, nn.Linear(1, 1), lambda: 0, {("a",): 1}, torch.zeros(2, device="meta")])
def test_what_a_file_cannot_hold_is_named(value: Any, tmp_path: Path) -> None:
    """Claim: a value that would need code to come back is refused by its place, and no file is written."""
    with pytest.raises(CheckpointError, match=r"'values'\]\['extra'\]"):
        setpoint.save_run(tmp_path / "run", extra={"deep": [value]} if not isinstance(value, nn.Module) else [value])
    assert not list(tmp_path.iterdir())


def test_a_loop_without_its_model_is_refused(tmp_path: Path) -> None:
    """Claim: a loop is not saved without model, optimizer and averaged copy: nobody could resume from that."""
    one = run()
    for missing, what in (("model", "model"), ("optimizer", "optimizer"), ("ema", "copy")):
        with pytest.raises(CheckpointError, match=f"without its {what}"):
            setpoint.save_run(tmp_path / "run", **{name: part for name, part in parts(one).items() if name != missing})


def test_other_parts_than_the_saved_ones_are_refused(tmp_path: Path) -> None:
    """Claim: missing and further parts, another module, another optimizer: an error each, and nothing is changed."""
    whole = run()
    whole.train(0, 12)
    setpoint.save_run(tmp_path / "run", **parts(whole))
    again = run()
    before = snapshot(again)
    wrong: list[dict[str, Any]] = [
        {name: part for name, part in parts(again).items() if name != "ema"},
        {**parts(again), "more": again.schedulers[0]},
        {**parts(again), "model": nn.Linear(2, 2)},
        {**parts(again), "optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())},
        parts(run(budget=0.8)),
    ]
    for each in wrong:
        with pytest.raises(CheckpointError):
            setpoint.load_run(tmp_path / "run", **each)
    with pytest.raises(CheckpointError, match="No such file"):
        setpoint.load_run(tmp_path / "none", **parts(again))
    assert_untouched(again, before)


# Damaged files.


def damages(content: bytes, count: int) -> list[bytes]:
    """The same content with bytes flipped, overwritten, cut off, left out, put in, or zeroed, in `count` ways."""
    chance = random.Random(0)

    def flip(at: int) -> bytes:
        return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]

    kinds: list[Callable[[int], bytes]] = [
        flip,
        lambda at: content[:at],
        lambda at: content[:at] + content[at + 1 + chance.randrange(16) :],
        lambda at: content[:at] + chance.randbytes(1 + chance.randrange(16)) + content[at:],
        lambda at: content[:at] + bytes(min(512, len(content) - at)) + content[at + 512 :],
        lambda at: chance.randbytes(at),
    ]
    found = []
    while len(found) < count:
        # Half of them at the start, where the header is.
        at = chance.randrange(len(content) if len(found) % 2 else min(3000, len(content)))
        changed = kinds[len(found) // 2 % len(kinds)](at)
        if changed != content:
            found.append(changed)
    return found


def test_400_damaged_files_are_each_refused(tmp_path: Path) -> None:
    """Claim: each of 200 damaged run files and 200 damaged models is a CheckpointError, and nothing of it is loaded."""
    whole, again, net = run(), run(), Net()
    whole.train(0, 12)
    file, model = tmp_path / "run", tmp_path / "small.safetensors"
    setpoint.save_run(file, **parts(whole))
    setpoint.save(whole.model, model)
    before, tensors_before = snapshot(again), {name: tensor.clone() for name, tensor in net.state_dict().items()}
    content = file.read_bytes()
    for path, load in (
        (file, lambda: setpoint.load_run(file, **parts(again))),
        (model, lambda: setpoint.load(model, into=net)),
    ):
        for changed in damages(path.read_bytes(), 200):
            path.write_bytes(changed)
            with pytest.raises(CheckpointError):
                load()
    assert all(torch.equal(tensor, tensors_before[name]) for name, tensor in net.state_dict().items())
    assert_untouched(again, before)
    assert not again.optimizers[0].state and again.schedulers[0].last_epoch == 0
    file.write_bytes(content)
    setpoint.load_run(file, **parts(again))
    assert again.loop.step == 12


# Forged files: with a right digest and wrong contents.

ESCAPE = "\x1b]0;x\x07"  # gives a terminal's window another title
ODD = (None, True, -1, 2**70, float("inf"), ESCAPE, [], {}, [[ESCAPE]], {ESCAPE: ESCAPE}, {"tensor": ESCAPE})
ODD += ({"tuple": 3}, {"array": 3}, {"dict": [[[1], 2]]})  # what is decoded in run files


def forged(text: str, count: int) -> Iterator[Any]:
    """What a text of JSON holds with one key or value in it exchanged, in `count` ways."""
    chance = random.Random(0)
    for _ in range(count):
        value = json.loads(text)
        places = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
        for holder, key in places:  # it grows meanwhile
            inner = holder[key]
            if isinstance(inner, (dict, list)):  # not all of 625 numbers of a random generator
                places += [(inner, each) for each in (inner if isinstance(inner, dict) else range(min(len(inner), 9)))]
        holder, key = chance.choice(places)
        odd = ESCAPE if isinstance(holder, dict) and chance.random() < 0.2 else key
        holder[odd] = holder.pop(key) if odd != key else copy.deepcopy(chance.choice(ODD))
        yield value


@pytest.mark.parametrize("kind", ["a ledger", "a model", "a run", "a state"])
def test_what_is_forged_is_refused_in_words(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: with one value exchanged, or one name, a ledger, a model's file, a run's and a state dict with sizes are
    taken or a SetpointError, and no control character reaches the terminal: by a report, an error or its causes.
    """
    ways, file = (25 if kind == "a run" else 60), tmp_path / "run.jsonl"
    whole, again = run(), run()
    whole.train(0, 22)
    whole.loop.ledger.end(22, 40, budget_met=True, reason="met", note="")
    whole.loop.ledger.save(file)
    setpoint.save(whole.model, tmp_path / "model")
    setpoint.save_run(tmp_path / "run", **parts(whole))
    header, stored = read_file(tmp_path / "model", "setpoint", "")
    tensors, state = read_file(tmp_path / "run", "setpoint_run", "")[1], whole.model.state_dict()

    def report(rows: Any) -> None:
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        with suppress(typer.Exit):
            report_of(file)

    def load(changed: Any) -> None:
        write_file(tmp_path / "forged", "setpoint", changed, stored)
        setpoint.load(tmp_path / "forged", into=Net())

    def load_run(changed: Any) -> None:
        tree = torch.frombuffer(bytearray(json.dumps(changed).encode()), dtype=torch.uint8)
        write_file(tmp_path / "forged", "setpoint_run", {}, {**tensors, TREE: tree})
        setpoint.load_run(tmp_path / "forged", **parts(again if again.loop.step == 0 else run()))

    def shrink(changed: Any) -> None:
        other = OrderedDict(state)
        other._metadata = changed  # type: ignore[attr-defined]
        setpoint.shrink_to(Net(), other)

    text, read = {
        "a ledger": (f"[{','.join(file.read_text(encoding='utf-8').splitlines())}]", report),
        "a model": (json.dumps(header), load),
        "a run": (tensors[TREE].numpy().tobytes().decode(), load_run),
        "a state": (json.dumps(state._metadata), shrink),  # type: ignore[attr-defined]
    }[kind]
    refused = 0
    for changed in forged(text, ways):
        seen = ""
        try:
            read(changed)
        except SetpointError as error:
            seen, refused = "".join(traceback.format_exception(error)), refused + 1
        said = capsys.readouterr()
        assert not {each for each in seen + said.out + said.err if each < " "} - {"\n"}, changed
        refused += "error:" in said.err
    assert refused > ways / 5


def test_a_named_pipe_is_not_opened(tmp_path: Path) -> None:
    """Claim: a pipe in the place of a file, which to read would wait for ever, is refused."""
    for name in ("small.safetensors", "run.jsonl"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="is no plain file"):
        setpoint.load(tmp_path / "small.safetensors", into=nn.Linear(2, 2))
    with pytest.raises(ReportError, match="is no plain file"):
        read_ledger(tmp_path / "run.jsonl")


class Bomb:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("dump", [torch.save, pickle.dump])
def test_a_pickle_is_never_run(dump: Callable[[Any, Any], None], tmp_path: Path, monkeypatch: Any) -> None:
    """Claim: a file that would run code when unpickled is refused by both readers, and its code does not run."""
    monkeypatch.chdir(tmp_path)
    with open(tmp_path / "run", "wb") as file:
        dump(Bomb(), file)
    with pytest.raises(CheckpointError, match="pickle"):
        setpoint.load_run(tmp_path / "run", model=nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="pickle"):
        setpoint.load(tmp_path / "run", into=nn.Linear(2, 2))
    assert not Path("exploded").exists()


def test_the_readers_tell_their_files_apart_and_without_a_loop_nothing_is_half_loaded(tmp_path: Path) -> None:
    """Claim: a model's file is no run file and a run file no model's, each is named; a model of another size is as it
    was.
    """
    setpoint.save(nn.Linear(2, 2), tmp_path / "model")
    setpoint.save_run(tmp_path / "run", model=nn.Linear(2, 2))
    other = nn.Linear(2, 3)
    before = [parameter.clone() for parameter in other.parameters()]
    for name, words in (("model", "save_run"), ("run", "model does not take")):
        with pytest.raises(CheckpointError, match=words):
            setpoint.load_run(tmp_path / name, model=other)
    with pytest.raises(CheckpointError, match="did not write"):
        setpoint.load(tmp_path / "run", into=other)
    assert all(map(torch.equal, before, other.parameters()))


# A disk that is full.


@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: wherever writing fails, the old file is whole, nothing is left beside it, and training goes on."""
    one, path = run(), tmp_path / "run"
    one.train(0, 6)
    setpoint.save_run(path, **parts(one))
    old = path.read_bytes()
    one.train(6, 8)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("setpoint.checkpoint.model_file.save_file" if where == "save_file" else f"os.{where}", full)
        with pytest.raises(CheckpointError, match="No space left"):
            setpoint.save_run(path, **parts(one))
    assert path.read_bytes() == old and [each.name for each in tmp_path.iterdir()] == ["run"]
    again = run()
    setpoint.load_run(path, **parts(again))
    again.train(6, 8)
    assert again.train(8, 12) == one.train(8, 12)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit on the size of files")
def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """Claim: when the system really refuses further bytes, the old file is whole and nothing is left beside it."""
    import resource

    model, path = nn.Linear(400, 400), tmp_path / "run"
    setpoint.save_run(path, model=model)
    setpoint.save(model, tmp_path / "model")
    old = [each.read_bytes() for each in sorted(tmp_path.iterdir())]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(CheckpointError, match="cannot write"):
            setpoint.save_run(path, model=model)
        with pytest.raises(CheckpointError, match="cannot write"):
            setpoint.save(model, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [each.read_bytes() for each in sorted(tmp_path.iterdir())] == old


def beside(one: Run) -> dict[str, Any]:
    """The parts of a run with a scaler, another model and another optimizer beside the loop."""
    torch.manual_seed(3)
    side = nn.Linear(2, 3)
    trains, scaler = torch.optim.AdamW(side.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    side(torch.randn(4, 2)).sum().backward()
    trains.step()
    return {**parts(one), "side": side, "trains": trains, "scaler": scaler}


# A run that is refused.


class Changed:
    """A part whose state is another one when it is saved."""

    def __init__(self, part: Any, change: Callable[[Any], None]) -> None:
        self.part, self.change = part, change

    def state_dict(self) -> Any:
        state = copy.deepcopy(self.part.state_dict())
        self.change(state)
        return state


def everything(one: Run, given: dict[str, Any]) -> list[Any]:
    """All that may be seen of a run and what is beside it, as values."""
    states = [copy.deepcopy(part.state_dict()) for name, part in given.items() if name != "loop"]
    modules = [repr(one.model), repr(one.ema), given["side"].weight.grad.clone()]
    # Not Python's generator, from which the type checker of the tests draws.
    chance = [torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()]
    loop = [one.loop.widths, one.loop.step, one.loop.origin, one.loop.ledger.to_rows(), one.loop.price]
    return tree_leaves([states, modules, chance, loop])


def assert_same(before: list[Any], after: list[Any]) -> None:
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        same = torch.equal(one, other) if torch.is_tensor(one) else np.array_equal(one, other)
        assert same, (one, other)


def refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError("no room")


def _lengthen(state: Any) -> None:
    state["state"][0]["exp_avg"] = torch.zeros(3, 3)


DAMAGED: list[tuple[str, Callable[[Any], None]]] = [
    ("loop", lambda state: state.pop("ledger")),
    ("loop", lambda state: state.update(sensor=None)),
    ("optimizer", _lengthen),
    ("optimizer", lambda state: state.pop("param_groups")),
]
OTHERS: list[dict[str, Any]] = [
    {"budget": 0.8},
    {"total_steps": 41},
    {"make": lambda p: torch.optim.Adam(p, lr=0.01)},
]


def test_a_refused_run_leaves_everything_as_it_was(dear: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: whatever load_run refuses, and however late, model, optimizer, scheduler, scaler, averaged copy, loop,
    generators and what is beside them are as before, in the memory where they were: the model is dense, and the run
    that was saved can still be loaded, and goes on bit for bit.
    """
    whole, again = run(), run()
    whole.train(0, 14)
    assert whole.loop.state_dict()["actuator"]["reserve"]["tensors"] and whole.loop.widths != again.loop.widths
    saved, given = beside(whole), beside(again)
    setpoint.save_run(tmp_path / "run", **saved)
    memory = {name: tensor.data_ptr() for name, tensor in again.model.state_dict().items()}
    before = everything(again, given)

    def check(path: Path, one: Run, given: dict[str, Any], before: list[Any]) -> None:
        with pytest.raises(CheckpointError):
            setpoint.load_run(path, **given)
        assert_same(before, everything(one, given))

    for options in OTHERS:
        other = run(**options)
        parts_of_other = beside(other)
        check(tmp_path / "run", other, parts_of_other, everything(other, parts_of_other))
        other.train(0, 2)
    for name, change in DAMAGED:
        each = {part: Changed(of, change if part == name else lambda state: None) for part, of in saved.items()}
        setpoint.save_run(tmp_path / "damaged", **each)
        check(tmp_path / "damaged", again, given, before)
    for part in ("model", "ema", "optimizer", "scheduler", "scaler", "trains", "side"):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=f"{part} does not take.*no room"):
            # A scheduler's state is all that it has: a method of its own would be a part of it.
            patch.setattr(type(given[part]) if part == "scheduler" else given[part], "load_state_dict", refuse)
            setpoint.load_run(tmp_path / "run", **given)
        assert_same(before, everything(again, given))
    assert memory == {name: tensor.data_ptr() for name, tensor in again.model.state_dict().items()}
    setpoint.load_run(tmp_path / "run", **given)
    assert again.train(14, 40) == whole.train(14, 40)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_refused_run_with_masks_leaves_no_mask(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the same where single weights are masked: no weight is zero, and no gradient is masked."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer, setpoint.Loop]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        half = setpoint.Budget.fraction(0.6, of="params")
        options: dict[str, Any] = {"example": (torch.zeros(4, 8),), "actuator": setpoint.Masking(pattern)}
        return model, optimizer, setpoint.attach(model, optimizer, half, total_steps=20, **options)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(4, 8)).square().mean().backward()
            optimizer.step()

    model, optimizer, loop = start()
    train(model, optimizer, 15)
    assert any(not bool(mask.all()) for mask in loop.masks.values())
    setpoint.save_run(tmp_path / "run", model=model, optimizer=optimizer, loop=loop)
    (model, optimizer, loop), (twin, plain, other) = start(), start()
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="no room"):
        patch.setattr(optimizer, "load_state_dict", refuse)
        setpoint.load_run(tmp_path / "run", model=model, optimizer=optimizer, loop=loop)
    train(model, optimizer, 2)
    train(twin, plain, 2)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert all(torch.equal(mask, other.masks[name]) for name, mask in loop.masks.items())
