"""Learned gates, *experimental*: a network says how open the gate of each unit should be."""
