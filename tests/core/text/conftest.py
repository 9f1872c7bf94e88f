from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import SHARED
from text_folders import byte_fallback_folder, byte_level_folder, real_folders

from lmx.core.text.tokenizer import Tokenizer

MADE = ("byte-level", "metaspace", "prepend")
CHECKPOINTS = ("dbrx", "falcon_mamba", "mixtral", "olmoe", "recurrent_gemma")
REAL = ("mixtral", "mixtral-22b", "mixtral-old", "dbrx", "gemma", "olmoe-0924", "olmoe-0125", "falcon")


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    known = {
        "byte-level": byte_level_folder(root / "byte-level"),
        "metaspace": byte_fallback_folder(root / "metaspace"),
        "prepend": byte_fallback_folder(root / "prepend", legacy=True),
    }
    if (SHARED / "data").is_dir():
        (root / "real").mkdir()
        known |= {f"real:{name}": path for name, path in real_folders(root / "real").items()}
        known |= {f"checkpoint:{path.name}": path for path in (SHARED / "checkpoints").iterdir()}

    def find(name: str) -> Path:
        if name not in known:
            pytest.skip("the folder ../shared with real tokenizers is not here")
        return known[name]

    return find


@pytest.fixture(scope="session")
def tokenizer_of(folder_of: Callable[[str], Path]) -> Iterator[Callable[[str], Tokenizer]]:
    loaded: dict[str, Tokenizer] = {}

    def load(name: str) -> Tokenizer:
        folder = folder_of(name)
        if name not in loaded:
            loaded[name] = Tokenizer.load(folder)
        return loaded[name]

    yield load
    loaded.clear()


ALL = [*MADE, *(f"checkpoint:{name}" for name in CHECKPOINTS), *(f"real:{name}" for name in REAL)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `kind` runs over every tokenizer there is."""
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", ALL)
