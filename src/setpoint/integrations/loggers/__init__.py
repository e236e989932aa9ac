"""Loggers that a loop's metrics go to, and the file that its ledger grows in."""
