"""`lmx show`: what a model is and what it needs, from its headers and configs alone."""

import typer


def register(app: typer.Typer) -> None:
    pass
