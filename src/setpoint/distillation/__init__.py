"""Distillation: a pruned model learns from a teacher as well, such as the dense model that was fine-tuned before."""

from setpoint.distillation.teacher import Teacher

__all__ = ["Teacher"]
