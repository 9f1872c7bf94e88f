"""The one root of every error that lmx raises on purpose.

Each kind carries the exit code of the command line (docs/cli.md) and a hint: what to do about it.
"""


class LmxError(Exception):
    """Something went wrong that the user can act on.

    `message` says in one line what is wrong with which file, tensor or option; `hint` says what to do.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(LmxError):
    """An option or argument that cannot be honoured."""

    exit_code = 2


class InputError(LmxError):
    """Bad or refused input: a broken checkpoint, an unsupported architecture, a hostile template, a failed check."""

    exit_code = 3


class NotFoundError(LmxError):
    """A model, file or repository that does not exist, is gated, or that we may not read."""

    exit_code = 4


class NetworkError(LmxError):
    """The network failed; trying again can help."""

    exit_code = 5


class ResourceError(LmxError):
    """Disk or memory would not suffice, or did not."""

    exit_code = 6


class ConflictError(LmxError):
    """The output exists already, or another process holds it."""

    exit_code = 7
