"""`lmx` and `python -m lmx`."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    from lmx.core.uncollected import uncollected

    with uncollected():
        from lmx.cli.main import app
        from lmx.cli.run import leave, run

    leave(run(app, sys.argv[1:]))


if __name__ == "__main__":
    main()
