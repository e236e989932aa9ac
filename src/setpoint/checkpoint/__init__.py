"""Checkpoints: a model's file, a run's file, and states of cut models that any framework saves."""
