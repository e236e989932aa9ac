"""The run-time type check of the tests: beartype, where an int may stand for a float, as in mypy."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
