"""The text fine-tuning task: the sentence model all-MiniLM-L6-v2 learns to tell from which play a speech is.

The speeches are those of tiny Shakespeare, which strings nine plays together.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from setpoint_bench.catalogue import task
from setpoint_bench.images import Splits
from setpoint_bench.recipe import Recipe
from setpoint_bench.sentences import SentenceClassifier, SentenceFamily, Texts, tokens_of
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.tasks.shakespeare import read_text
from setpoint_bench.tensors import held_out

MIN_WORDS = 8
# Each play by the words it opens with, in the order of the text; Coriolanus comes first.
OPENINGS = {
    "Richard III": "GLOUCESTER:\nNow is the winter of our discontent",
    "Richard II": "KING RICHARD II:\nOld John of Gaunt",
    "Romeo and Juliet": "\nSAMPSON:\nGregory, o' my word",
    "Henry VI, part 3": "WARWICK:\nI wonder how the king escaped our hands",
    "The Winter's Tale": "ARCHIDAMUS:\nIf you shall chance, Camillo",
    "Measure for Measure": "DUKE VINCENTIO:\nEscalus.",
    "The Taming of the Shrew": "SLY:\nI'll pheeze you",
    "The Tempest": "Master:\nBoatswain!",
}
NUM_PLAYS = 1 + len(OPENINGS)


class PlayClassifier(SentenceClassifier):
    """A classifier with a name of its own, which is part of the task's fingerprint in committed results."""


@task("finetune-text")
def finetune_text(data: Path | None = None) -> SimpleTask:
    """A pretrained sentence model learns which play a speech is from.

    Speeches have at least eight words: a fixed fifth tests, a fixed tenth of the rest validates.

    Args:
        data: folder that holds `karpathy/tiny_shakespeare`, or None for the usual places.
    """
    recipe = Recipe(
        steps=300, batch=32, rule="adamw", learning_rate=2e-4, weight_decay=0.01, warm_up=0.1, fall="linear", mixed=True
    )
    texts = Texts(speeches, 3_789, data)
    return SimpleTask(
        "finetune-text", SentenceFamily(NUM_PLAYS, PlayClassifier), texts, recipe, scratch_learning_rate=4.0
    )


@lru_cache(maxsize=1)
def speeches(data: Path | None) -> Splits:
    """Tokens and plays of each split; a speech is taken without the name of who speaks."""
    texts, plays = labelled_speeches(read_text(data))
    tokens = tokens_of(texts)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    test, rest = torch.split(order, [len(order) // 5, len(order) - len(order) // 5])
    labels = torch.tensor(plays)
    train, validation = held_out((tokens[rest], labels[rest]))
    return {"train": train, "validation": validation, "test": (tokens[test], labels[test])}


def labelled_speeches(text: str) -> tuple[list[str], list[int]]:
    r"""Speeches of at least eight words, and the number of the play that each is from.

    >>> labelled_speeches("CORIOLANUS:\nAway, my disposition, and possess me Some harlot's spirit!")
    (["Away, my disposition, and possess me Some harlot's spirit!"], [0])
    """
    texts, plays, play = [], [], 0
    openings = list(OPENINGS.values())
    for speech in text.split("\n\n"):
        if play < len(openings) and speech.startswith(openings[play]):
            play += 1
        _, _, words = speech.strip().partition("\n")
        if len(words.split()) >= MIN_WORDS:
            texts.append(words)
            plays.append(play)
    return texts, plays
