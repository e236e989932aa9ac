"""Dropped units that come back: a reserve, probes, returns. Experimental; only `setpoint.attach` knows it."""
