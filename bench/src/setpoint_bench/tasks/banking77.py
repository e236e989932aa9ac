"""The intent task: the sentence model all-MiniLM-L6-v2 learns to tell 77 questions that people have for their bank."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from setpoint_bench.catalogue import task
from setpoint_bench.hub_data import columns_of
from setpoint_bench.images import Splits
from setpoint_bench.recipe import Recipe
from setpoint_bench.sentences import FewLayers, SentenceFamily, Texts, tokens_of
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.tensors import held_out

REPOSITORY = "PolyAI/banking77"
NUM_INTENTS = 77
NUM_TRAIN = 9_003
KEPT = (1, 3, 5)


@task("banking77")
def banking77(data: Path | None = None) -> SimpleTask:
    """A pretrained sentence model learns which of 77 intents a customer's question has.

    Two passes over nine tenths of the 10,003 training questions, of which a fixed tenth validates; 3,080 test. The
    first 32 tokens count. Casanueva et al., "Efficient intent detection with dual sentence encoders", 2020.

    Args:
        data: folder that holds `PolyAI/banking77`, or None for the usual places.
    """
    recipe = Recipe(
        steps=1, batch=32, rule="adamw", learning_rate=4e-4, weight_decay=0.01, warm_up=0.1, fall="linear", mixed=True
    )
    texts = Texts(questions, NUM_TRAIN, data)
    made = SimpleTask("banking77", SentenceFamily(NUM_INTENTS), texts, recipe, scratch_learning_rate=4.0)
    return replace(made, neighbour="banking77-three-layers").with_epochs(2)


@lru_cache(maxsize=1)
def questions(data: Path | None) -> Splits:
    rows = {split: columns_of(REPOSITORY, split, ("text", "label"), data) for split in ("train", "test")}
    pairs = {name: (tokens_of(each["text"]), torch.tensor(each["label"])) for name, each in rows.items()}
    train, validation = held_out(pairs["train"])
    return {"train": train, "validation": validation, "test": pairs["test"]}


@task("banking77-three-layers")
def three_layers(data: Path | None = None) -> SimpleTask:
    """The task banking77 with layers one, three and five of the sentence model alone.

    It is the small rival of a cut model. Sanh et al., "DistilBERT, a distilled version of BERT", 2019, section 3.

    Args:
        data: folder that holds `PolyAI/banking77`, or None for the usual places.
    """
    return replace(banking77(data), name="banking77-three-layers", family=FewLayers(SentenceFamily(NUM_INTENTS), KEPT))
