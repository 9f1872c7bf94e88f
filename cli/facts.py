"""Numbers as people read them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmx.core.placement import Share


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


def share_line(share: "Share", layers: int) -> str:
    """What lies on a device: "cuda:0: 27 of 32 layers, 19 banks of experts, head; 11.2 GB with room for the state"."""
    held = [f"{share.layers} of {layers} layers"] if share.layers else []
    held += [f"{share.banks} bank{'s' * (share.banks != 1)} of experts"] if share.banks else []
    held += ["embedding"] * share.embed + ["head"] * share.head
    return f"{share.device}: {', '.join(held)}; {human_bytes(share.nbytes)} with room for the state"
