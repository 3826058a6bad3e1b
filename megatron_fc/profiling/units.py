"""Figures for people: three digits, and decimal prefixes as bandwidths have them."""

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def show_bytes(count: float) -> str:
    """Return e.g. `1.23 GB`."""
    return _scaled(count, "B")


def show_rate(bytes_per_second: float) -> str:
    """Return e.g. `4.3 TB/s`."""
    return _scaled(bytes_per_second, "B/s")


def show_seconds(seconds: float) -> str:
    """Return e.g. `12.3 ms`."""
    if seconds >= 1 or seconds == 0:
        return f"{_digits(seconds)} s"
    return f"{_digits(seconds * 1e3)} ms" if seconds >= 1e-3 else f"{_digits(seconds * 1e6)} µs"


def show_count(count: float) -> str:
    """Return e.g. `6.92 G`, and numbers below ten thousand as they are."""
    return f"{count:,.0f}" if count < 10_000 else _scaled(count, "")


def show_number(count: int, what: str) -> str:
    """Return e.g. `1 rank`, `8 ranks`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def _scaled(value: float, unit: str) -> str:
    prefix = 0
    while value >= 999.5 and prefix + 1 < len(_PREFIXES):
        value, prefix = value / 1e3, prefix + 1
    is_whole = not prefix and (value >= 10 or value == int(value))
    digits = f"{value:.0f}" if is_whole else _digits(value)
    return f"{digits} {_PREFIXES[prefix]}{unit}"


def _digits(value: float) -> str:
    """Three significant ones, no exponent."""
    if value == 0 or value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
