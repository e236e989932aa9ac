"""Hugging Face: Trainer, folders of pretrained models, Accelerate, PEFT - the real packages on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import setpoint
from setpoint.controller.priced import PricedController
from setpoint.distillation import Teacher
from setpoint.errors import CheckpointError, LoopError
from setpoint.integrations.checkpointing import enable_transformers
from setpoint.integrations.transformers import SetpointCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant.*"),
]

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
STEPS = 16


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random tokens; each is its own label, or a row has one of three."""

    def __init__(self, classes: bool = False) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": tokens, "labels": torch.tensor(number % 3) if self.classes else tokens}


@pytest.fixture(autouse=True)
def _no_compiler_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer that compiles tells Accelerate so by the environment, which keeps it for the whole process."""
    from accelerate.state import AcceleratorState

    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)


def build(kind: str) -> Any:
    """A tiny model, by seed."""
    set_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=16, **SMALL))
    config = BertConfig(vocab_size=64, max_position_embeddings=16, num_labels=3, **SMALL)
    return BertForSequenceClassification(config)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Of a short run on the CPU."""
    usual: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "save_steps": 3,
        "logging_steps": 4,
        "report_to": [],
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**{**usual, **settings})


def trainer(
    kind: str, folder: Path, *, callback: SetpointCallback | None = None, **settings: Any
) -> tuple[Trainer, SetpointCallback]:
    """A Trainer with one line added."""
    data, callback = Tokens(kind == "bert"), callback or SetpointCallback(0.6, controller=PricedController())
    given = arguments(folder, **settings)
    return Trainer(build(kind), given, train_dataset=data, eval_dataset=data, callbacks=[callback]), callback


def weights(model: Any) -> dict[str, Tensor]:
    """Copies of all tensors of a state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether they are the same to the bit."""
    return left.keys() == right.keys() and all(
        left[n].shape == right[n].shape and torch.equal(left[n], right[n]) for n in left
    )


@pytest.mark.parametrize("kind", [pytest.param("gpt2", marks=pytest.mark.slow), "llama", "bert"])
def test_trainer_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Claim: one line is enough; from checkpoints before, between and after cuts the run ends with the same bits."""
    whole, callback = trainer(kind, tmp_path / "whole")
    whole.train()
    assert callback.summary is not None and callback.summary.budget_met and callback.summary.resizes >= 2
    assert whole.optimizer.state_dict()["state"][0]["exp_avg"].shape == next(iter(whole.model.parameters())).shape
    logs = [row for row in whole.state.log_history if "loss" in row]
    ratios = {name for name in callback.loop.metrics() if name.startswith("cost_ratio/")}
    kept = {f"setpoint/{name}" for name in ("budget_met", "units", "overhead_flops_ratio", *ratios)}
    assert logs and all({name for name in row if name.startswith("setpoint/")} == kept for row in logs)
    cuts = [entry.step for entry in callback.loop.ledger if entry.dropped]
    assert min(cuts) > 1 and any(min(cuts) <= step < max(cuts) for step in range(3, STEPS, 3))
    for step in (3, 6, 15):
        again, resumed = trainer(kind, tmp_path / "again")
        again.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        assert equal(weights(again.model), weights(whole.model)), step
        assert [each.widths for each in resumed.loop.ledger] == [each.widths for each in callback.loop.ledger]


def test_a_trainer_that_knew_nothing_at_first_resumes(tmp_path: Path) -> None:
    """Claim: so do one whose model is built late, and whose callback comes late; one with nothing left to train ends;
    a callback that is used again has the summary of its last run.
    """

    def late(folder: str, resume: str | None = None) -> Trainer:
        made = Trainer(args=arguments(tmp_path / folder), train_dataset=Tokens(), model_init=lambda: build("gpt2"))
        made.add_callback(callback)
        made.train(resume_from_checkpoint=resume)
        return made

    callback = SetpointCallback(0.6)
    uninterrupted = late("whole")
    first = callback.summary
    again = late("again", str(tmp_path / "whole" / f"checkpoint-{STEPS // 6 * 3}"))
    assert first is not None and callback.summary is not None and callback.summary is not first
    assert equal(weights(uninterrupted.model), weights(again.model))
    ended = late("again", str(tmp_path / "whole" / f"checkpoint-{STEPS}"))
    assert callback.summary is None and equal(weights(uninterrupted.model), weights(ended.model))


def test_the_best_model_is_loaded_at_the_end_whatever_its_widths(tmp_path: Path) -> None:
    """Claim: load_best_model_at_end takes a wider checkpoint into the narrow model, and a warning says so."""
    run, callback = trainer(
        "gpt2",
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        greater_is_better=True,  # so that the first, dense one is the best
    )
    with pytest.warns(UserWarning, match=r"saved before the last cut.*best_within_budget=True"):
        run.train()
    assert callback.summary is not None and callback.summary.budget_met
    assert str(run.state.best_model_checkpoint).endswith("checkpoint-3")
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, abs=1e-6)
    widths = [layer.mlp.c_fc.weight.shape[1] for layer in run.model.transformer.h]
    final = [callback.summary.widths[f"transformer.h.{number}.mlp.c_fc"] for number in (0, 1)]
    assert sum(widths) > sum(final)


def _best() -> SetpointCallback:
    return SetpointCallback(0.6, best_within_budget=True, controller=PricedController())


class EndsEarly(TrainerCallback):  # type: ignore[misc]
    """Ends the training after an evaluation, as `EarlyStoppingCallback` does."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At step 14."""
        control.should_training_stop = state.global_step == 14


def test_the_best_model_within_the_budget_is_loaded_where_training_ends_early(tmp_path: Path) -> None:
    """Claim: with best_within_budget=True no larger checkpoint is loaded, and an early end is no change by others."""
    settings: dict[str, Any] = {"load_best_model_at_end": True, "greater_is_better": True, "eval_strategy": "steps"}
    settings |= {"eval_steps": 2, "save_steps": 2}
    run, callback = trainer(
        "gpt2",
        tmp_path,
        callback=_best(),
        **settings,
    )
    run.add_callback(EndsEarly())
    run.train()
    summary = callback.summary
    assert summary is not None and summary.budget_met and "changed" not in summary.reason
    assert summary.steps == 14 and int(str(run.state.best_model_checkpoint).rpartition("-")[2]) > 2
    assert sum(each.numel() for each in run.model.parameters()) == summary.final_params
    best, folder = run.state.best_model_checkpoint, str(tmp_path / "checkpoint-10")
    again, _ = trainer(
        "gpt2",
        tmp_path,
        callback=_best(),
        **settings,
    )
    again.train(resume_from_checkpoint=folder)
    assert again.state.best_model_checkpoint == best


def test_a_tolerance_is_refused_at_once() -> None:
    """Claim: the callback is given no loss of each step, so a tolerance is refused before the Trainer is made."""
    with pytest.raises(ValueError, match="a Tolerance needs the loss of each step"):
        SetpointCallback(setpoint.Tolerance(0.1, of="flops"))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_folders_of_cut_models_load_with_from_pretrained(kind: str, tmp_path: Path) -> None:
    """Claim: save_pretrained writes setpoint.json, and from_pretrained of the class and of AutoModel reads it back.

    Weights are equal to the bit. Outputs are near: products may round otherwise where weights lie elsewhere in memory.
    """
    run, callback = trainer(kind, tmp_path / "run", save_strategy="no")
    run.train()
    run.save_model(str(tmp_path / "small"))
    tokens = torch.arange(8)[None]
    want = run.model.eval()(tokens).logits
    assert (tmp_path / "small/setpoint.json").is_file()
    loaded = type(run.model).from_pretrained(tmp_path / "small")
    assert equal(weights(loaded), weights(run.model))
    torch.testing.assert_close(loaded(tokens).logits, want)
    base, inner = AutoModel.from_pretrained(tmp_path / "small"), getattr(loaded, loaded.base_model_prefix)
    torch.testing.assert_close(base(tokens).last_hidden_state, inner(tokens).last_hidden_state)
    loaded.save_pretrained(tmp_path / "again")
    again = type(run.model).from_pretrained(tmp_path / "again")
    assert equal(weights(again), weights(run.model))
    torch.testing.assert_close(again(tokens).logits, want)
    build(kind).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again/setpoint.json").exists()


def test_a_pipeline_in_another_process_reads_the_folder(tmp_path: Path) -> None:
    """Claim: enable_checkpointing() is the one line that a process needs that only reads."""
    run, _ = trainer("bert", tmp_path / "run", save_strategy="no")
    run.train()
    run.save_model(str(tmp_path / "small"))
    want = run.model.eval()(torch.arange(8)[None]).logits.tolist()
    code = (
        "import torch, setpoint, json\n"
        "setpoint.enable_checkpointing()\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        f"model = Auto.from_pretrained({str(tmp_path / 'small')!r})\n"
        "print(json.dumps(model(torch.arange(8)[None]).logits.tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), torch.tensor(want))


def test_damaged_and_foreign_sizes_are_refused(tmp_path: Path) -> None:
    """Claim: a setpoint.json that is damaged, newer or of another model is named."""
    enable_transformers()
    run, _ = trainer("llama", tmp_path / "run", save_strategy="no")
    run.train()
    run.save_model(str(tmp_path / "small"))
    file = tmp_path / "small/setpoint.json"
    good = json.loads(file.read_text())
    for wrong, words in (
        ("{", "damaged"),
        (json.dumps({**good, "format": 9}), "format 9"),
        (json.dumps({**good, "shapes": {"absent.weight": [3]}}), "this one has no 'absent.weight'"),
    ):
        file.write_text(wrong)
        with pytest.raises(CheckpointError, match=words):
            LlamaForCausalLM.from_pretrained(tmp_path / "small")


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"max_grad_norm": 0.5, "lr_scheduler_type": "cosine", "optim": "sgd"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_a_trainer_can_do(settings: dict[str, Any], tmp_path: Path) -> None:
    """Claim: accumulation, mixed precision, checkpointed gradients and other optimizers meet the budget, too."""
    run, callback = trainer("llama", tmp_path, save_strategy="no", **settings)
    run.train()
    assert callback.summary is not None and callback.summary.budget_met and callback.summary.resizes


def test_two_ranks_by_accelerate_resume_bit_for_bit(tmp_path: Path) -> None:
    """Claim: in DistributedDataParallel, with bf16, accumulation and checkpointed gradients, ranks cut alike, load the
    best model, and a run goes on from a checkpoint with the same bits.
    """
    script = Path(__file__).parent / "transformers_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("alike") == 2, done.stderr[-3000:]


@pytest.mark.parametrize("same", [False, True])
def test_a_callback_given_twice_is_refused(same: bool, tmp_path: Path) -> None:
    """Claim: two of them, or one twice, would cut the same model: said in words before anything happens."""
    run, callback = trainer("gpt2", tmp_path, save_strategy="no")
    run.add_callback(callback if same else SetpointCallback(0.5))
    with pytest.raises(LoopError, match="to the Trainer twice"):
        run.train()
    assert callback.loop is None


def _accelerated(folder: Path | None, until: int = STEPS, early: bool = False) -> tuple[Any, setpoint.Loop, Any]:
    """A loop of Accelerate's kind, which goes on from a folder, that is loaded early, before `attach`, or after it."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = build("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    loader = torch.utils.data.DataLoader(Tokens(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = 6 if folder is not None and folder.exists() else 0
    if early:
        accelerator.load_state(str(folder))
    loop = setpoint.attach(model, optimizer, 0.6, total_steps=STEPS, resume=True)
    if step and not early:
        accelerator.load_state(str(folder))
    while step < until:
        for number, batch in enumerate(loader):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            if number % 2:
                step += 1
            if step == until:
                break
            if step == 6 and number % 2 and folder is not None and not folder.exists():
                accelerator.save_state(str(folder))
    return model, loop, accelerator


@pytest.mark.parametrize("early", [False, True])
def test_accelerate_saves_and_loads_its_state(tmp_path: Path, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: attach to what prepare returns; load_state goes on with the loop, and FLOPs are per optimizer step. After
    enable_checkpointing the state, safetensors without sizes, may also come before attach.
    """
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", torch.nn.Module.load_state_dict)
    model, loop, _ = _accelerated(tmp_path / "state")
    assert loop.step == STEPS and loop.finish().budget_met
    if early:
        setpoint.enable_checkpointing()
    again, resumed, _ = _accelerated(tmp_path / "state", early=early)
    assert resumed.step == STEPS and resumed.widths == loop.widths and resumed.finish().budget_met
    assert [each.widths for each in resumed.ledger][:3] == [each.widths for each in loop.ledger][:3]
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_adapters_keep_their_ranks_and_follow_their_base(tmp_path: Path) -> None:
    """Claim: with PEFT's LoRA base layers are cut with their adapters; merging, saving and loading work."""
    from peft import LoraConfig, PeftModel, get_peft_model

    enable_transformers()
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    loop = setpoint.attach(model, optimizer, 0.8, total_steps=STEPS)
    tokens = torch.randint(0, 64, (8, 12))
    for _ in range(STEPS):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    summary = loop.finish()
    assert summary.budget_met and summary.resizes
    ranks = {parameter.shape[0] for name, parameter in model.named_parameters() if "lora_A" in name}
    assert ranks == {4} and any("rank of an adapter" in each for each in loop.ledger.header["frozen"].values())
    want = model.eval()(tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    base = model.unload()
    base.save_pretrained(tmp_path / "base")
    small = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(small, tmp_path / "adapter").eval()
    assert torch.equal(again(tokens).logits, want)
    merged = again.merge_and_unload()
    assert torch.allclose(merged(tokens).logits, want, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits, merged(tokens).logits)


def _taught(folder: Path, **settings: Any) -> tuple[Trainer, SetpointCallback]:
    """A Trainer with a teacher."""
    callback = SetpointCallback(0.6, verify=False, **settings)
    return trainer(
        "gpt2", folder, callback=callback, max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )


def test_a_teacher_is_followed_counted_and_left_alone(tmp_path: Path) -> None:
    """Claim: the smaller model stays nearer to its dense copy, whose forwards are overhead; the run resumes."""
    tokens = torch.stack([Tokens()[number]["input_ids"] for number in range(8)])
    with torch.no_grad():
        dense = build("gpt2").eval()(tokens).logits.log_softmax(-1)

    def distance(model: Any) -> float:
        with torch.no_grad():
            own = model.eval()(tokens).logits.log_softmax(-1)
        return float(torch.nn.functional.kl_div(own, dense, log_target=True, reduction="sum"))

    plain, without = _taught(tmp_path / "plain")
    plain.train()
    dense_model = build("gpt2")
    before = weights(dense_model)
    run, callback = _taught(tmp_path / "taught", teacher=Teacher(dense_model, alpha=1.0))
    run.train()
    assert callback.summary is not None and without.summary is not None and callback.summary.budget_met
    assert equal(weights(dense_model), before)
    assert distance(run.model) < 0.2 * distance(plain.model)
    more = callback.summary.overhead_flops - without.summary.overhead_flops
    assert more == pytest.approx(8 * callback.summary.dense_flops / 3, rel=0.01)
    again, resumed = _taught(tmp_path / "again", teacher=Teacher(build("gpt2"), alpha=1.0))
    again.train(resume_from_checkpoint=str(tmp_path / "taught/checkpoint-3"))
    assert equal(weights(again.model), weights(run.model))
    assert resumed.summary is not None and resumed.summary.overhead_flops == callback.summary.overhead_flops


@pytest.mark.parametrize(("save", "when"), [("steps", "steps"), ("epoch", "epoch"), ("best", "steps")])
def test_the_end_of_a_bill_is_saved_and_evaluated_and_is_the_end(save: str, when: str, tmp_path: Path) -> None:
    """Claim: the last checkpoint is of the last step, as with `max_steps`, and no run goes on from it.

    With "best" it is saved where it is the best.
    """

    def run() -> tuple[Trainer, SetpointCallback]:
        callback = SetpointCallback({"flops": "50%", "flops/run": "100%"}, verify=False, total_steps=24)
        return trainer(
            "gpt2", tmp_path, callback=callback, max_steps=200, per_device_train_batch_size=2, save_strategy=save,
            save_steps=5, eval_strategy=when, eval_steps=5, metric_for_best_model="loss", load_best_model_at_end=True,
            learning_rate=1e-3 if save == "best" else 5e-5,  # each evaluation is better than those before
        )  # fmt: skip

    trained, callback = run()
    trained.train()
    summary = callback.summary
    assert summary is not None and summary.budget_met and summary.steps % 5 and summary.steps < 96
    last = tmp_path / f"checkpoint-{summary.steps}"
    evaluated = [each["step"] for each in trained.state.log_history if "eval_loss" in each]
    assert last.is_dir() and evaluated[-1] == summary.steps and evaluated == sorted(set(evaluated))
    again, _ = run()
    with pytest.raises(LoopError, match="has spent its budget: nothing is left to train"):
        again.train(resume_from_checkpoint=str(last))
    assert again.state.global_step == summary.steps


def test_a_teacher_that_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    """Claim: another kind of model is named before the first step, and a head that is new is no teacher of itself."""
    run, _ = _taught(tmp_path, teacher=build("bert"))
    with pytest.raises(ValueError, match="the teacher does not take what the model takes"):
        run.train()
    run, _ = _taught(tmp_path, teacher=True)
    with pytest.raises(LoopError, match="its head is new, and teaches nothing"):
        run.train()
