"""Rows of cells: a table for a person, one tab-separated line each for a pipe."""

import sys
from collections.abc import Sequence

from lmx.cli.console import is_terminal, may_decorate, write


def write_rows(rows: Sequence[tuple[str, ...]], headings: Sequence[str] = ()) -> None:
    """Write rows to stdout; without headings, of a name and a value each. Cells must be safe for a terminal already."""
    if not is_terminal(sys.stdout):
        write("".join("\t".join(row) + "\n" for row in rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    decorated = may_decorate(sys.stdout)
    table = Table(show_header=bool(headings), box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    if not headings:
        table.add_column(style="bold" if decorated else "", no_wrap=True)
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(no_color=not decorated, highlight=False).print(table)
