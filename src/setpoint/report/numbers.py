"""Numbers for readers: three digits, a prefix and a unit."""

import math

PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
NOTHING = "–"
MINUS = "\N{MINUS SIGN}"


def scale(largest: float, unit: str) -> tuple[float, str]:
    """The factor and the prefixed unit in which numbers up to `largest` are easy to read.

    >>> scale(2.4e9, "FLOPs")
    (1000000000.0, 'GFLOPs')
    >>> scale(71_172, "parameters")
    (1000.0, 'k parameters')
    """
    for factor, prefix in PREFIXES:
        if abs(largest) >= factor:
            return factor, prefix + (" " if prefix and len(unit) > 5 else "") + unit  # a word is no symbol
    return 1.0, unit


def human(value: float | None, unit: str = "") -> str:
    """A count with three digits, a prefix and a unit.

    >>> human(1.234e9, "FLOPs"), human(45_210), human(None)
    ('1.23 GFLOPs', '45.2 k', '–')
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    # Rounded before the prefix is chosen, so that 999.9 becomes 1 k and not "1e+03".
    rounded = float(f"{value:.3g}")
    factor, prefixed = scale(rounded, unit)
    return f"{digits(rounded / factor)} {prefixed}".rstrip()


def digits(value: float) -> str:
    """Three significant digits without an exponent where that is readable.

    >>> digits(12.345), digits(0.000012345), digits(-3)
    ('12.3', '1.23e-05', '−3')
    """
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}".replace("-", MINUS, 1) if value < 0 else f"{value:.3g}"
    text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", MINUS)


def duration(seconds: float | None) -> str:
    """A duration in the unit that suits it.

    >>> duration(0.0123), duration(8.25), duration(125), duration(7320)
    ('12.3 ms', '8.25 s', '2 min 5 s', '2 h 2 min')
    """
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 0:
        return MINUS + duration(-seconds)
    if seconds < 1:
        return f"{digits(seconds * 1e3)} ms" if seconds else "0 s"
    if seconds < 100:
        return f"{digits(seconds)} s"
    rounded = round(seconds)
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60} min"


def percent(share: float | None) -> str:
    """A share in percent.

    >>> percent(0.4983), percent(0.09999), percent(0.0049), percent(1e-6), percent(None)
    ('49.8 %', '10.0 %', '0.49 %', '< 0.01 %', '–')
    """
    if share is None or not math.isfinite(share):
        return NOTHING
    # Three digits: 99.95 would be rounded to 100.0, and 9.995 to 10.00.
    value = share * 100
    if 0 < value < 0.005:  # a cost is never nothing
        return "< 0.01 %"
    return f"{value:.{0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2}f} %".replace("-", MINUS)


def share(part: float, whole: float) -> str:
    """A part of a whole in percent."""
    return percent(part / whole if whole else None)
