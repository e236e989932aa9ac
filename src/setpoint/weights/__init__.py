"""Masks on single weights: a leaf, which only `setpoint.attach` knows."""
