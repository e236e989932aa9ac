"""Dropped units that come back, *experimental*: a reserve, probes, returns. Only `setpoint.attach` knows it."""
