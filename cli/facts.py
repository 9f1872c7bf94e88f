"""Numbers as people read them."""


def human_count(number: int) -> str:
    """46.7B, 2.1M, 515."""
    return _scaled(number, 1000, ("", "K", "M", "B", "T"))


def human_bytes(number: int) -> str:
    """93.4 GB, 4.1 MB: powers of 1000, as disks and download pages count."""
    return _scaled(number, 1000, (" bytes", " kB", " MB", " GB", " TB"))


def _scaled(number: int, base: int, units: tuple[str, ...]) -> str:
    value, unit = float(number), 0
    while value >= base * 0.9995 and unit < len(units) - 1:
        value /= base
        unit += 1
    return f"{number}{units[0]}" if unit == 0 else f"{value:.1f}{units[unit]}"


def memory_line(name: str, nbytes: int, kind: str) -> str:
    """What is said before weights are made in memory that are not mapped. kind: their dtype or scheme."""
    return f"{name}: its weights take {human_bytes(nbytes)} of memory as {kind}"
