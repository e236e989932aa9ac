"""Models to train: a linear recurrent unit and a sequence classifier made of it."""

from setpoint.models.classifier import SequenceBlock, SequenceClassifier
from setpoint.models.lru import LRU
from setpoint.models.scan import diagonal_scan

__all__ = ["LRU", "SequenceBlock", "SequenceClassifier", "diagonal_scan"]
