"""Even widths: what a plain reader of transformers models takes, without Setpoint."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import setpoint
from controller.plants import observe, run, unit_group
from golden.models import GPT
from setpoint.actuator.mask import mask
from setpoint.configs.even import Even, evened, shared_widths
from setpoint.controller.even import EvenController
from setpoint.cost.cost import ProductCost, Term
from setpoint.errors import GroupError, LoopError
from setpoint.gates.gated import GatedController
from setpoint.groups.group import Group, Size, widths_of
from setpoint.groups.trace import Trace, trace
from setpoint.sensor.reading import Reading

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 48}
TEXT |= {"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, "num_key_value_heads": 4}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("AutoModelForCausalLM", GROUPED),
    "mistral": ("AutoModelForCausalLM", GROUPED),
    "qwen2": ("AutoModelForCausalLM", GROUPED),
    "qwen3": ("AutoModelForCausalLM", {**GROUPED, "head_dim": 8}),
    "phi3": ("AutoModelForCausalLM", {**GROUPED, "attention_dropout": 0.0}),  # heads and gates fused in one weight
    "gpt2": (
        "AutoModelForCausalLM",
        {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1}
        | {"eos_token_id": 2, **NO_DROPOUT},
    ),
    "bert": ("AutoModelForSequenceClassification", TEXT),
    "vit": ("AutoModelForImageClassification", {**IMAGE, "image_size": 16, "patch_size": 4}),
}
HEADS = {"llama", "mistral", "phi3", "qwen2", "qwen3", "vit"}
"""Families whose config has a place for an explicit size of a head."""


@cache
def built(family: str) -> tuple[nn.Module, Any, Trace]:
    """A model in double precision, an example, and its trace; not to be changed."""
    torch.manual_seed(0)
    auto, sizes = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = getattr(transformers, auto).from_config(config).double().eval()
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        pixels = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).double()}
        return model, pixels, trace(model, pixels)
    example: dict[str, Any] = {"input_ids": torch.randint(3, 60, (2, 9), generator=generator)}
    if family != "bert":
        example["use_cache"] = False
    return model, example, trace(model, example)


def logits(model: nn.Module, example: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**example).logits
    return found


@cache
def even_of(family: str) -> Even:
    return evened(built(family)[0], built(family)[2], None, allow_lossy=False)


@cache
def cut_evenly(family: str) -> tuple[nn.Module, nn.Module]:
    """A model of which every kind has lost every second unit, other ones in each layer; and its masked twin."""
    even = even_of(family)
    small, twin = copy.deepcopy(built(family)[0]), copy.deepcopy(built(family)[0])
    order = np.random.default_rng(0)
    some = [group for group in even.groups if group.lossless]
    keep = {group.name: order.permutation(group.num_units) % 2 == 0 for group in some}
    setpoint.shrink(small, None, even.traced.groups, keep)
    mask(twin, None, even.traced.groups, keep)
    return small, twin


@cache
def saved(family: str) -> str:
    """Folder of the evenly cut model, with an example and the outputs of its twin."""
    example, folder = built(family)[1], f"{tempfile.mkdtemp()}/{family}"
    model, twin = cut_evenly(family)
    model.save_pretrained(folder)
    torch.save((example, logits(twin, example)), f"{folder}/example.pt")
    return folder


READER = """
import sys, json, torch, transformers
for auto, folder in json.loads(sys.argv[1]):
    model = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float64).eval()
    example, want = torch.load(folder + "/example.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**example).logits, want, rtol=0, atol=1e-12)
assert not [name for name in sys.modules if name.startswith("setpoint")]
"""


def test_a_process_without_setpoint_reads_them() -> None:
    """Claim: so it is in a fresh process that never imports Setpoint, in all eight families."""
    jobs = [[auto, saved(family)] for family, (auto, _) in FAMILIES.items()]
    command = [sys.executable, "-W", "ignore", "-c", READER, json.dumps(jobs)]
    told = subprocess.run(command, capture_output=True, text=True, check=False, env={"OMP_NUM_THREADS": "1"})
    assert told.returncode == 0, told.stderr[-2000:]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_says_what_it_can(family: str) -> None:
    """Claim: neurons everywhere, heads where the size of a head can be written, and query heads go along evenly."""
    model = built(family)[0]
    small, _ = cut_evenly(family)
    config, whole = small.config, model.config
    assert config.hidden_size == 32 and whole.to_dict() == type(whole).from_dict(whole.to_dict()).to_dict()
    assert (config.n_inner if family == "gpt2" else config.intermediate_size) == (64 if family == "gpt2" else 24)
    fewer = whole.num_attention_heads // 2 if family in HEADS else whole.num_attention_heads
    assert config.num_attention_heads == fewer
    if family in HEADS:
        assert config.head_dim == (8 if family in ("qwen3", "vit") else 4)
        assert getattr(whole, "num_key_value_heads", 4) == 4 and getattr(config, "num_key_value_heads", 2) == 2
    frozen = even_of(family).frozen
    assert bool([name for name, why in frozen.items() if "no place for fewer of its heads" in why]) == (
        family not in HEADS
    )


def test_widths_that_a_config_refuses_are_left_out() -> None:
    """Claim: Llama's config wants heads that divide the hidden size, so 8 heads of 4 groups go by halves, not to 6."""
    model, _, traced = built("llama")
    (said,) = shared_widths(model, [group for group in traced.groups if group.what == "head"])
    assert len(said.names) == 2 and said.block == 2
    heads = [group for group in even_of("llama").groups if group.what == "head"]
    assert {(group.multiple_of, group.min_units) for group in heads} == {(2, 2)}


def train(model: nn.Module, example: Any, budget: Any = 0.6, steps: int = 20, **settings: Any) -> setpoint.Loop:
    """A run under `even=True`; at every step all layers of a kind have one width."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    loop = setpoint.attach(model, optimizer, budget, example=example, total_steps=steps, **{"even": True, **settings})
    for _ in range(steps):
        output = model(**example).logits if isinstance(example, dict) else model(*example)
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        by_kind: dict[str, set[int]] = {}
        for name, width in loop.widths.items():
            by_kind.setdefault(name.translate({ord(digit): "*" for digit in "0123456789"}), set()).add(width)
        assert all(len(widths) == 1 for widths in by_kind.values()), by_kind
    loop.finish()
    assert loop.summary is not None and loop.summary.budget_met and loop.summary.resizes
    return loop


@pytest.mark.parametrize(
    ("family", "number", "dense_number"), [("gpt2", "n_inner", None), ("phi3", "num_key_value_heads", 4)]
)
def test_a_run_ends_with_a_true_config(family: str, number: str, dense_number: int | None, tmp_path: Path) -> None:
    """Claim: attach(even=True) keeps GPT-2 even at every step, meets the budget, and an EMA copy's config follows; so
    with Phi-3, whose attention slices one weight by numbers of the config while it runs.
    """
    dense, example, _ = built(family)
    model = setpoint.resumable(copy.deepcopy(dense))
    average = copy.deepcopy(model)
    torch.manual_seed(0)  # which kind of units goes depends on it
    loop = train(model, example, copies=[average], verify=False, controller=setpoint.PricedController())
    cut = ("h.0.mlp.c_fc", "h.1.mlp.c_fc") if family == "gpt2" else ("qkv_proj", "qkv_proj")
    widths = [width for name, width in loop.widths.items() if name.endswith(cut)]
    assert len(widths) == 2 and len(set(widths)) == 1 and (family == "phi3" or len(loop.widths) == 2)
    width, full = widths[0], 128 if family == "gpt2" else 4
    assert getattr(model.config, number) == getattr(average.config, number) == width < full
    assert getattr(dense.config, number) == dense_number
    model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    # Not bit for bit: kernels round by how memory lies.
    torch.testing.assert_close(logits(plain, example), logits(model, example), rtol=0.0, atol=1e-12)
    fresh = setpoint.resumable(copy.deepcopy(dense))
    fresh.load_state_dict(model.state_dict())
    assert getattr(fresh.config, number) == width and torch.equal(logits(fresh, example), logits(model, example))


def test_a_model_without_a_config_is_even_by_its_names() -> None:
    """Claim: the heads and the neurons of a plain GPT keep one width each, with its default controller or its own."""
    tokens = (torch.randint(0, 16, (4, 8)),)
    gradual = setpoint.PricedController()
    for settings in ({"controller": gradual}, {"even": False, "controller": EvenController(gradual)}):
        torch.manual_seed(0)
        loop = train(GPT(), tokens, **settings)
        assert len(set(loop.widths)) > len(set(loop.widths.values())) and max(loop.widths.values()) < 64


class Run:
    """A run of an MLP with three hidden layers of one width, as a framework would keep it."""

    def __init__(self, budget: Any = 0.3) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU()]
        self.model = setpoint.resumable(nn.Sequential(*layers, nn.Linear(24, 3)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.budget, self.step = budget, 0

    def train(self, until: int) -> setpoint.Loop:
        """Attach and train on."""
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
        settings = {"example": (x,), "total_steps": 40, "even": True, "resume": True, "verify": False}
        if not isinstance(self.budget, setpoint.Tolerance):
            settings["controller"] = setpoint.PricedController()
        loop = setpoint.attach(self.model, self.optimizer, self.budget, **settings)
        while self.step < until:
            self.step += 1
            loss = self.model(x * (1 + 0.01 * self.step)).square().mean()
            loss.backward()
            if isinstance(self.budget, setpoint.Tolerance):
                loop.observe(loss=loss.detach())
            self.optimizer.step()
            self.optimizer.zero_grad()
            assert len(set(loop.widths.values())) == 1
        return loop


def test_an_even_run_goes_on_bit_for_bit() -> None:
    """Claim: states of model and optimizer, taken between two cuts, continue an even run with the same bits."""
    straight, first, second = Run(), Run(), Run()
    straight.train(40)
    before = first.train(8).widths
    assert max(before.values()) < 24
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.step = 8
    assert second.train(40).widths != before
    assert all(torch.equal(*pair) for pair in zip(straight.model.parameters(), second.model.parameters(), strict=True))


def test_a_cut_that_is_taken_back_in_training_is_taken_back_evenly() -> None:
    """Claim: under a tolerance that no cut keeps, cuts come back, and layers have one width at every step."""
    loop = Run(setpoint.Tolerance(loss=1e-9)).train(40)
    assert any(entry.grown for entry in loop.ledger) and any(entry.dropped for entry in loop.ledger)


def test_a_config_follows_where_a_format_drops_the_sizes() -> None:
    """Claim: going on from shapes alone, as in safetensors, the config says them again before the next cut."""
    dense, example, _ = built("gpt2")
    settings = {"example": example, "total_steps": 20, "even": True, "resume": True, "verify": False}
    models = [setpoint.resumable(copy.deepcopy(dense)) for _ in range(2)]
    first, second = ((model, torch.optim.AdamW(model.parameters(), 1e-2)) for model in models)
    loop = setpoint.attach(*first, 0.6, **settings)
    for _ in range(8):
        first[0](**example).logits.square().mean().backward()
        first[1].step()
        first[1].zero_grad()
    width = loop.widths["transformer.h.0.mlp.c_fc"]
    assert width < 128
    second[0].load_state_dict(dict(first[0].state_dict()))
    second[1].load_state_dict(first[1].state_dict())
    assert second[0].config.n_inner is None
    assert setpoint.attach(*second, 0.6, **settings).widths == loop.widths and second[0].config.n_inner == width


# The controller by itself.


def layers(*widths: int) -> tuple[tuple[Group, ...], ProductCost]:
    """Blocks of heads and neurons."""
    groups = tuple(
        unit_group(f"block.{i}.{what}", width * 2 if what == "neurons" else width, multiple_of=4 if width > 8 else 1)
        for i, width in enumerate(widths)
        for what in ("heads", "neurons")
    )
    terms = tuple(Term(10.0 + i % 2, (Size(0, ((group.name, 1),)), Size(8))) for i, group in enumerate(groups))
    return groups, ProductCost("flops", terms)


def test_each_layer_loses_its_own_least_salient_units() -> None:
    """Claim: widths are equal at every decision, and kept units are the most salient ones of their layer."""
    groups, cost = layers(16, 16, 16, 8)
    rng = np.random.default_rng(0)
    saliency = {group.name: rng.lognormal(size=group.num_units) for group in groups}
    decisions = run(EvenController(setpoint.PricedController()), groups, cost, saliency, fraction=0.5)
    assert decisions[-1].plan.budget_met and len([each for each in decisions if each.plan.drops()]) > 1
    for decision in decisions:
        widths = widths_of(decision.groups)
        for what in ("heads", "neurons"):
            assert len({widths[f"block.{i}.{what}"] for i in range(3)}) == 1
    first = next(each for each in decisions if each.plan.drops())
    for name, kept in first.plan.keep.items():
        assert kept.all() or saliency[name][~kept].max() <= saliency[name][kept].min()
    assert "a unit stands for one in each layer" in first.plan.reason


def test_kinds_that_are_given_hold_together() -> None:
    """Claim: groups with different names stay equal where a kind says so; layers of other widths are refused."""
    groups, cost = layers(12, 12)
    kind = ("block.0.heads", "block.1.heads")
    saliency = {group.name: np.arange(1.0, 1 + group.num_units) for group in groups}
    controller = EvenController(setpoint.PricedController(), kinds=(kind,))
    last = run(controller, groups, cost, saliency, fraction=0.4)[-1]
    assert len({widths_of(last.groups)[name] for name in kind}) == 1
    uneven = (replace(groups[0], num_units=10), *groups[1:])
    seen = observe(uneven, cost, limit=1.0, dense=9.0, reading=Reading(1, {}, 1))
    with pytest.raises(LoopError, match=r"one kind have different widths \(block.0.heads: 10, block.1.heads: 12\)"):
        controller.decide(controller.init(groups), seen, cost, uneven)


def test_what_cannot_be_even_is_refused_in_a_sentence() -> None:
    """Claim: no place in the config, single weights, gates, single units that come back: an error that says so."""
    model, example, traced = built("bert")
    heads = tuple(group for group in traced.groups if group.what == "head")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.config.to_dict()
    settings = {"example": example, "total_steps": 9, "even": True}
    with pytest.raises(
        GroupError,
        match="even=True leaves nothing to cut.*BertConfig has no place for fewer of its h.*Attach without even",
    ):
        setpoint.attach(model, optimizer, 0.5, groups=heads, **settings)
    with pytest.raises(LoopError, match="Masking"):
        setpoint.attach(model, optimizer, 0.5, actuator=setpoint.Masking("2:4"), **settings)
    with pytest.raises(LoopError, match="brings single units back"):
        setpoint.attach(model, optimizer, 0.5, controller=setpoint.PricedController(regrow=True), **settings)
    with pytest.raises(LoopError, match="GatedController learns"):
        EvenController(GatedController())
    one = tuple(group for group in traced.groups if group.name.endswith("0.intermediate.dense"))
    with pytest.raises(GroupError, match="even=True leaves nothing to cut"):
        setpoint.attach(model, optimizer, 0.9, groups=one, **settings)
    assert model.config.to_dict() == before


def test_layers_of_two_widths_stay_two_kinds() -> None:
    """Claim: a layer that is narrower from the start keeps its own width, also where the others are cut to it."""
    groups, cost = layers(16, 16, 8)
    saliency = {group.name: np.arange(1.0, 1 + group.num_units) for group in groups}
    decisions = run(EvenController(setpoint.PricedController()), groups, cost, saliency, fraction=0.4)
    assert decisions[-1].plan.budget_met
    for decision in decisions:
        found = widths_of(decision.groups)
        assert found["block.0.heads"] == found["block.1.heads"] and found["block.0.neurons"] == found["block.1.neurons"]
