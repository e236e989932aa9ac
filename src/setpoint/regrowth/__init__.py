"""Dropped units that come back: a reserve, probes, returns. Experimental; a leaf, which only `setpoint.attach` knows."""
