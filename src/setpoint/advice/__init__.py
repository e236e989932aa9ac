"""Advice before a run: whether pruning while training pays, from which start size, and for how many steps."""
