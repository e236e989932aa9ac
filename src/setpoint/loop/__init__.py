"""The loop: sense, decide, act and record, at every step of the user's own training loop."""
