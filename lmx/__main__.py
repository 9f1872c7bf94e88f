"""`lmx` and `python -m lmx`."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    from lmx.cli.main import app
    from lmx.cli.run import run

    sys.exit(run(app, sys.argv[1:]))


if __name__ == "__main__":
    main()
