from collections.abc import Iterator

import pytest
from measured import Commands


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    with Commands() as started:
        yield started
