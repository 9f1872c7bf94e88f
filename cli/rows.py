"""Names and values: a table for a person, one tab-separated line each for a pipe."""

import sys
from collections.abc import Sequence

from lmx.cli.console import is_terminal, may_decorate, write


def write_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Write rows to stdout. Values must be safe for a terminal already."""
    if not is_terminal(sys.stdout):
        write("".join(f"{name}\t{value}\n" for name, value in rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    decorated = may_decorate(sys.stdout)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold" if decorated else "")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    Console(no_color=not decorated, highlight=False).print(table)
