"""Models to train: a linear recurrent unit and a sequence classifier made of it."""

from setpoint_bench.models.lru import LRU, SequenceBlock, SequenceClassifier

__all__ = ["LRU", "SequenceBlock", "SequenceClassifier"]
