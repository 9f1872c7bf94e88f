"""The five families by their `model_type`. A family's module, and torch with it, is imported when it is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmx.core.config import ModelConfig
from lmx.core.errors import InputError

if TYPE_CHECKING:
    from lmx.core.decoder import Decoder
    from lmx.core.names import NameTable

_MODULES = {
    "falcon_mamba": "falcon_mamba",
    "recurrent_gemma": "recurrent_gemma",
    "olmoe": "olmoe",
    "dbrx": "dbrx",
    "mixtral": "mixtral",
}

MODEL_TYPES = tuple(_MODULES)


@dataclass(frozen=True)
class Family:
    """All that the rest of lmx needs to know of one architecture.

    parse: config.json -> the family's config; decoder: that config -> its stack of layers; names: the hub's names.
    """

    model_type: str
    title: str
    parse: Callable[[Mapping[str, object]], ModelConfig]
    decoder: "Callable[[Any], Decoder[Any]]"
    names: "Callable[[Any], NameTable]"


def model_type_of(config: Mapping[str, object]) -> str:
    """Which family a config.json names; imports no torch. Raises InputError for any other architecture."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MODULES:
        raise InputError(
            f"config.json: model_type {model_type!r:.80} is not supported",
            f"lmx runs {', '.join(MODEL_TYPES)}.",
        )
    return model_type


def family_of(config: Mapping[str, object]) -> Family:
    """The family that a config.json names. Raises InputError for any other architecture."""
    model_type = model_type_of(config)
    family = import_module(f"lmx.core.models.{_MODULES[model_type]}").FAMILY
    if not isinstance(family, Family):
        raise TypeError(f"{model_type}: FAMILY is no Family")
    return family
