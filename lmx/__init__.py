"""Run FalconMamba, RecurrentGemma, OLMoE, DBRX and Mixtral on the machine you have.

Names are loaded when first used, so that `import lmx` stays cheap: it imports no torch.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmx.api import load as load
    from lmx.conversion import convert as convert
    from lmx.core.errors import LmxError as LmxError
    from lmx.language_model import LanguageModel as LanguageModel
    from lmx.pulling import pull as pull
    from lmx.quantization import quantize as quantize

# Started from the root of a checkout, Python finds this folder before any installed lmx; its siblings
# (core, cli, ...) are then looked up beside it. An installed package has no pyproject.toml beside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and str(_root) not in __path__:
    __path__.append(str(_root))

__version__ = "0.1.0"

_EXPORTS = {
    "LanguageModel": "lmx.language_model",
    "LmxError": "lmx.core.errors",
    "load": "lmx.api",
    "pull": "lmx.pulling",
    "quantize": "lmx.quantization",
}

__all__ = ["LanguageModel", "LmxError", "__version__", "convert", "load", "pull", "quantize"]


class _Convert(ModuleType):
    """The package `lmx.convert`, which can be called: it is `lmx.conversion.convert`, too."""

    def __call__(self, *args: object, **options: object) -> object:
        return import_module("lmx.conversion").convert(*args, **options)


# Two things have this name, and Python puts a package into its parent's namespace over whatever stands there.
import_module("lmx.convert").__class__ = _Convert


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'lmx' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
