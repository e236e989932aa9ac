"""Checkpoints: a model's file, and plain data as tensors that a file without pickles can hold."""

from setpoint.checkpoint.model_file import damaged, digest, load, read_file, save, write_file

__all__ = ["damaged", "digest", "load", "read_file", "save", "write_file"]
