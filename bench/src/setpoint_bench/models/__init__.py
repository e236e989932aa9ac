"""Models to train: a linear recurrent unit and a sequence classifier made of it."""

from setpoint_bench.models.classifier import SequenceBlock, SequenceClassifier
from setpoint_bench.models.lru import LRU

__all__ = ["LRU", "SequenceBlock", "SequenceClassifier"]
