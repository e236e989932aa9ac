"""Models to train: a linear recurrent unit and a sequence classifier made of it."""

from setpoint_bench.models.classifier import SequenceBlock, SequenceClassifier
from setpoint_bench.models.lru import LRU
from setpoint_bench.models.scan import diagonal_scan

__all__ = ["LRU", "SequenceBlock", "SequenceClassifier", "diagonal_scan"]
