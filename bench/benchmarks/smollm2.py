"""A language model cut and taught: SmolLM2-135M at 70 and 50 % of its parameters outside of the embeddings.

    python bench/benchmarks/smollm2.py dense setpoint-even-70 layers-70 --work runs/smollm2

`pretrained` is the model as it comes; `dense` adapts it to the task's domain. Every other run begins with that one,
is cut, and trains as many steps with it as the teacher; `dense-more` is not cut and has no teacher. `METHOD-SHARE` is
a method below at a share of the parameters in percent; `METHOD-SHARE-lora` trains adapters and norms alone. A process
has one thread. A row of `results/smollm2.json` is one run; what stands there is not run again, and a model that
`--work` holds is not trained again. One learning rate, set before the first run, is that of all cut models.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from record import held_in, write
from torch import Tensor, nn
from torch.nn import functional

import setpoint
from setpoint.actuator.shrink import shrink
from setpoint.distillation import Teacher
from setpoint.groups.group import Group
from setpoint_bench.catalogue import task_named
from setpoint_bench.counter import step_flops
from setpoint_bench.environment import machine, package_version
from setpoint_bench.simple_task import SimpleTask, dense_widths
from setpoint_bench.task import Split
from setpoint_bench.tasks.shakespeare import read_text
from setpoint_bench.tasks.smollm2 import LanguageModel, TokenWindows, tokenizer, with_adapters

OUT = Path(__file__).resolve().parents[2] / "results" / "smollm2.json"
CONFIG = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
WHOLE = 106_203_456  # parameters outside of the embeddings
DENSE_STEPS = 200  # of the model that all others begin with
RATE, RATE_OF_ADAPTERS = 5e-4, 2e-3  # peaks of cut models
GRID = 32  # neurons come in blocks of so many, as the formats of four and eight bits in llama.cpp want
CALIBRATION = 4  # batches that a cut before the training may look at, as `attach` does by itself
PROMPTS = (
    "What is gravity?",
    "Write a short story about a dog who learns to swim.",
    "How do I make a cup of tea?",
    "Explain photosynthesis to a child.",
    "Name three rivers in Europe and say something about each.",
    "Why is the sky blue?",
    "Write a polite email that asks for a day off.",
    "What is the difference between a virus and a bacterium?",
    "Give me five ideas for a healthy breakfast.",
    "Who was Isaac Newton?",
    "How does a bicycle stay upright?",
    "Summarise the story of Romeo and Juliet.",
)
Cut = Callable[[SimpleTask, LanguageModel, float], None]


def outside_embeddings(model: nn.Module) -> int:
    """Parameters of the network without its embeddings and without adapters."""
    return sum(each.numel() for name, each in model.named_parameters() if "lora_" not in name and "embed" not in name)


def cut_by_activations(task: SimpleTask, model: LanguageModel, limit: float, keep_heads: int = 2) -> None:
    """Even cuts by mean activations: Muralidharan et al., "Compact language models via pruning" (Minitron), 2024.

    A neuron by the norm of what it gives the next layer, over the batch, the mean over time; a head likewise. The
    number of heads is that which Setpoint's even cut keeps at this share; neurons take what is left.
    """
    groups, inputs = lossless(task, model), inputs_of_readers(task, model)
    scores = {}
    for group in groups:
        norms = inputs[reader(group)].flatten(0, 1).square().mean(0).sqrt()
        scores[group.name] = norms.view(group.num_units, -1).square().sum(1).sqrt()
    size = {group.name: cost_of_unit(model, group) for group in groups}
    heads = sum(keep_heads * size[group.name] for group in groups if group.what == "head")
    fixed = outside_embeddings(model) - sum(size[group.name] * group.num_units for group in groups)
    neurons = (
        int((limit - heads - fixed) / sum(size[group.name] for group in groups if group.what != "head")) // GRID * GRID
    )
    widths = {group.name: keep_heads if group.what == "head" else neurons for group in groups}
    keep = {name: torch.zeros(len(each), dtype=torch.bool) for name, each in scores.items()}
    for name, each in scores.items():
        keep[name][each.topk(widths[name]).indices] = True
    shrink(model, (), groups, keep)
    model.network.config.intermediate_size = neurons
    model.network.config.num_key_value_heads = keep_heads
    model.network.config.num_attention_heads = 3 * keep_heads


def cut_by_fluctuation(task: SimpleTask, model: LanguageModel, limit: float) -> None:
    """Own widths by how much a unit fluctuates, the mean of what goes kept as a bias: An et al., "FLAP", AAAI 2024."""
    groups, inputs = lossless(task, model), inputs_of_readers(task, model)
    means, scores = {}, {}
    for group in groups:
        rows = inputs[reader(group)].flatten(0, 1)
        weight = model.get_parameter(f"{reader(group)}.weight")
        means[group.name] = rows.mean(0)
        each = (rows.var(0) * weight.square().sum(0)).view(group.num_units, -1).mean(1)
        scores[group.name] = ((each - each.mean()) / each.std()).double()
    size = {group.name: cost_of_unit(model, group) for group in groups}
    left = float(outside_embeddings(model))
    order = sorted(
        (float(score) / size[group.name], group.name, unit)
        for group in groups
        for unit, score in enumerate(scores[group.name] - scores[group.name].min())
    )
    keep = {group.name: torch.ones(group.num_units, dtype=torch.bool) for group in groups}
    for _, name, unit in order:
        if left <= limit:
            break
        if keep[name].sum() > 1:
            keep[name][unit] = False
            left -= size[name]
    for group in groups:
        layer: Any = model.get_submodule(reader(group))
        gone = ~keep[group.name].repeat_interleave(len(means[group.name]) // group.num_units)
        layer.bias = nn.Parameter(layer.weight[:, gone].detach() @ means[group.name][gone])
    blocks = {group.name: 1 if group.what == "head" else GRID for group in groups}
    for name, kept in keep.items():  # back to whole blocks, the best of what went first
        short = -int(kept.sum()) % blocks[name]
        again = scores[name].masked_fill(kept, -torch.inf).topk(short).indices
        kept[again] = True
    shrink(model, (), lossless(task, model), keep)


def cut_layers(task: SimpleTask, model: LanguageModel, limit: float) -> None:
    """Whole layers, those that change their input least: Men et al., "ShortGPT", 2024."""
    network: Any = model.network
    layers = network.model.layers
    influence = dict.fromkeys(range(len(layers)), 0.0)

    def look(number: int, _: nn.Module, args: Any, output: Any) -> None:
        given, made = args[0].float(), (output[0] if isinstance(output, tuple) else output).float()
        influence[number] += float(1 - functional.cosine_similarity(given, made, dim=-1).mean())

    handles = [layer.register_forward_hook(partial(look, number)) for number, layer in enumerate(layers)]
    calibrate(task, model)
    for handle in handles:
        handle.remove()
    size = sum(each.numel() for each in layers[0].parameters())
    count = int((limit - (outside_embeddings(model) - size * len(layers))) / size)
    kept = sorted(sorted(influence, key=influence.__getitem__)[-count:])
    network.model.layers = nn.ModuleList(layers[number] for number in kept)
    network.config.num_hidden_layers = count
    for number, layer in enumerate(network.model.layers):
        layer.self_attn.layer_idx = number


def cut_by_compress(task: SimpleTask, model: LanguageModel, limit: float, *, even: bool = False) -> None:
    embeddings = sum(each.numel() for each in model.parameters()) - outside_embeddings(model)
    budget = setpoint.Budget("params", limit + embeddings)
    batches = [x for x, _ in islice(task.batches(0), CALIBRATION)]
    print(setpoint.compress(model, batches, budget, even=even, num_samples=CALIBRATION * task.recipe.batch))


CUTS: Mapping[str, Cut | None] = {
    "setpoint": None,  # cuts while it trains
    "setpoint-even": None,
    "layers": cut_layers,
    "minitron": cut_by_activations,
    "flap": cut_by_fluctuation,
    "compress": cut_by_compress,
    "compress-even": partial(cut_by_compress, even=True),
}


def lossless(task: SimpleTask, model: nn.Module) -> tuple[Group, ...]:
    return tuple(group for group in setpoint.find_groups(model, task.example()) if group.lossless)


def reader(group: Group) -> str:
    """The layer that reads a group's units."""
    return next(part.tensor.removesuffix(".weight") for part in group.slices if part.dim == 1)


def cost_of_unit(model: nn.Module, group: Group) -> int:
    return sum(model.get_parameter(part.tensor).numel() // group.num_units for part in group.slices)


@torch.no_grad()
def calibrate(task: SimpleTask, model: nn.Module) -> None:
    for inputs, _ in islice(task.batches(0), CALIBRATION):
        task.scores(model, inputs)


def inputs_of_readers(task: SimpleTask, model: nn.Module) -> dict[str, Tensor]:
    """What the layers that read units are given on the calibration batches, by name of the layer."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.setdefault(name, []).append(args[0].float()))
        for name, module in model.named_modules()
        if name.endswith(("o_proj", "down_proj"))
    ]
    calibrate(task, model)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(each) for name, each in found.items()}


def answers(task: SimpleTask, work: Path) -> list[tuple[Tensor, int]]:
    """What the model as it comes says to each prompt, as tokens, and where its answer begins; made once."""
    file = work / "answers.json"
    if not file.exists():
        model, said = task.build(dense_widths(task)).eval(), []
        for prompt in PROMPTS:
            talk = [{"role": "user", "content": prompt}]
            text = tokenizer().apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
            tokens = torch.tensor([tokenizer()(text)["input_ids"]])
            with torch.no_grad(), task.autocast():
                made: Any = model.network.generate(tokens, max_new_tokens=96, do_sample=False)  # type: ignore[operator, union-attr]
            said.append([made[0].tolist(), tokens.shape[1]])
        file.write_text(json.dumps(said), encoding="utf-8")
    return [(torch.tensor([tokens]), begin) for tokens, begin in json.loads(file.read_text(encoding="utf-8"))]


@torch.no_grad()
def perplexities(task: SimpleTask, model: LanguageModel, work: Path) -> dict[str, float]:
    """Of the domain's held-out files, of tiny Shakespeare, and of what the dense model answers to prompts."""
    splits: tuple[Split, ...] = ("validation", "test")
    losses = {f"domain {split}": task.evaluate(model, split).loss for split in splits}
    shakespeare = torch.tensor(tokenizer()(read_text(None)[:200_000], verbose=False)["input_ids"])
    windows = zip(*(each.split(4) for each in TokenWindows().spread(shakespeare, 32)), strict=True)
    model.eval()
    parts = [functional.cross_entropy(task.scores(model, x).flatten(0, 1), y.flatten()) for x, y in windows]
    losses["Shakespeare"] = float(torch.stack(parts).mean())
    total = [
        functional.cross_entropy(task.scores(model, said[:, :-1])[0, begin - 1 :], said[0, begin:], reduction="none")
        for said, begin in answers(task, work)
    ]
    losses["answers"] = float(torch.cat(total).mean())
    return {name: round(float(torch.tensor(loss).exp()), 3) for name, loss in losses.items()}


def train(
    task: SimpleTask, model: LanguageModel, taught_by: nn.Module | None, seed: int, limit: float | None, even: bool
) -> dict[str, Any]:
    """Train, with a teacher where there is one; with a limit Setpoint is attached."""
    optimizer, batches, teacher, loop = task.optimizer(model), task.batches(seed), None, None
    schedule, notes = task.schedule(optimizer), dict[str, Any]()
    if taught_by is not None:
        teacher = Teacher(taught_by)
    if limit is not None:
        others = sum(each.numel() for each in model.parameters()) - outside_embeddings(model)
        # Adapters shrink with their layers; that the embeddings stay is what the limit is about.
        budget = setpoint.Budget("params", limit + others)
        loop = setpoint.attach(
            model,
            optimizer,
            budget,
            example=task.example(),
            total_steps=task.steps,
            even=even,
            grid=GRID,
            teacher=teacher,
        )
    begin = time.perf_counter()
    model.train()
    for step in range(1, task.steps + 1):
        inputs, targets = next(batches)
        if teacher is None or loop is not None:  # a loop has its teacher
            loss = task.loss(model, inputs, targets)
        else:
            own = task.scores(model, inputs)
            with task.autocast():
                taught = teacher.logits(inputs)
            loss = teacher.loss(task.criterion(own, targets), own, taught)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0 or step <= 6:
            print(f"{step} of {task.steps}: {loss.item():.3f}, {time.perf_counter() - begin:.0f} s", flush=True)
    if loop is not None:
        summary = loop.finish()
        print(summary)
        notes = {"budget_met": summary.budget_met}
    moments = sum(x.nbytes for each in optimizer.state.values() for x in each.values() if isinstance(x, Tensor))
    return {**notes, "training_s": round(time.perf_counter() - begin), "optimizer_bytes": moments}


def rebuilt(task: SimpleTask, state: Mapping[str, Tensor]) -> LanguageModel:
    """The model of these tensors, whatever its layers, widths and biases are."""
    model: Any = task.build(dense_widths(task))
    network = model.network
    count = 1 + max(int(found[1]) for name in state if (found := re.search(r"layers\.(\d+)\.", name)))
    network.model.layers, network.config.num_hidden_layers = network.model.layers[:count], count
    for name, value in state.items():
        owner, _, own = name.rpartition(".")
        layer = model.get_submodule(owner)
        if isinstance(layer, nn.Linear) and own == "weight":
            layer.out_features, layer.in_features = value.shape
        setattr(layer, own, nn.Parameter(value, requires_grad="embed" not in name and "lm_head" not in name))
    network.tie_weights()
    return model  # type: ignore[no-any-return]


def run(name: str, task: SimpleTask, work: Path, seed: int) -> dict[str, Any]:
    """One run: the row, and the model in the work folder."""
    parsed = re.fullmatch(r"(.+?)(?:-(\d+))?(-lora)?", name)
    assert parsed is not None
    kind, share, adapters = parsed.groups()
    file, row = work / f"{name}-{seed}-{task.steps}.pt", dict[str, Any](run=name, seed=seed, steps=task.steps)
    limit = float(share) / 100 * WHOLE if share else None
    if not file.exists():
        torch.manual_seed(seed)
        model: Any = task.build(dense_widths(task))
        taught_by = None
        if kind not in ("pretrained", "dense"):
            dense = torch.load(work / f"dense-{seed}-{DENSE_STEPS}.pt", weights_only=True)
            model.load_state_dict(dense["state"])
            taught_by = copy.deepcopy(model).to(task.product_dtype) if share else None
        cut = CUTS[kind] if share else None
        if limit is not None and cut is not None:
            began = time.perf_counter()
            model.eval()
            cut(task, model, limit)
            row |= {"cut_s": round(time.perf_counter() - began, 1), "as cut": perplexities(task, model, work)}
            print(row, flush=True)
        if adapters:
            model.network = with_adapters(model.network)
        attached = limit if cut is None else None
        if kind != "pretrained":
            row |= train(task, model, taught_by, seed, attached, kind.endswith("even"))
        if adapters:
            model.network = model.network.merge_and_unload()
        row["config"] = {each: getattr(model.network.config, each) for each in CONFIG}
        torch.save({"state": model.state_dict(), "row": row}, file)
    saved = torch.load(file, weights_only=True)
    model, row = rebuilt(task, saved["state"]), saved["row"]
    left = outside_embeddings(model)
    row |= {"perplexity": perplexities(task, model, work), "parameters": left, "share": round(left / WHOLE, 4)}
    return row | {"step_flops": step_flops(model, task.example()), "learning_rate": task.recipe.learning_rate}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="pretrained, dense, dense-more, dense-lora, METHOD-SHARE[-lora]")
    parser.add_argument("--work", type=Path, required=True, help="folder of models, which stay")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, help="learning rate, in place of the task's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.runs:
        known = held_in(options.out).get("rows", [])
        if any((each["run"], each["seed"], each["steps"]) == (name, options.seed, options.steps) for each in known):
            continue
        task = task_named("smollm2", steps=options.steps)
        own = task.recipe.learning_rate if name.startswith("dense") else RATE
        rate = options.rate or (RATE_OF_ADAPTERS if name.endswith("lora") else own)
        task = replace(task, recipe=replace(task.recipe, learning_rate=rate))
        row = run(name, task, options.work, options.seed)
        packages = {each: package_version(each) for each in ("transformers", "peft", "numpy", "sympy", "networkx")}
        row |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "packages": packages}
        row["cpu"] = machine()["cpu"]
        print(json.dumps(row), flush=True)
        rows = [*held_in(options.out).get("rows", []), row]
        write({**held_in(options.out), "rows": rows}, options.out)


if __name__ == "__main__":
    main()
