"""How long a pull goes on trying."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to try: attempts in a row that bring nothing, and the seconds between them, doubled each time."""

    attempts: int = 7
    first_wait: float = 0.5
    longest_wait: float = 20.0
    longest_asked: float = 300.0
    """The most that a server may ask for by Retry-After."""

    def wait(self, misses: int, asked: float | None) -> float:
        """Seconds before the next attempt. Without an order from the server, spread, so that not all come at once."""
        if asked is not None:
            return asked
        return min(self.longest_wait, self.first_wait * 2 ** (misses - 1)) * random.uniform(0.7, 1.0)
