"""Words: how a sentence says how many, and of which kind."""

from __future__ import annotations


def counted(number: float, what: str) -> str:
    """So many of a thing.

    >>> counted(1, "group"), counted(1200, "unit"), counted(0, "cut")
    ('1 group', '1,200 units', '0 cuts')
    """
    return f"{number:,.0f} {what}{'' if number == 1 else 's'}"


def a_type(value: object) -> str:
    """What a value is, by the name of its type.

    >>> a_type(3), a_type({})
    ('an int', 'a dict')
    """
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeio' else 'a'} {name}"
