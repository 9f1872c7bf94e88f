"""What to quantize and how, and the `quantization_config` of config.json that says so to other tools."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

from lmx.core.errors import InputError
from lmx.quant.codebook import FourBitType
from lmx.quant.four_bit import check_block_size
from lmx.quant.quanto import QUANTO_TYPES, QuantoType

Scheme = Literal["nf4", "fp4", "int8", "qint8", "qint4", "qint2", "qfloat8"]
SCHEMES: tuple[str, ...] = get_args(Scheme)
DTYPES = ("float32", "float16", "bfloat16")

# The largest activation that LLM.int8() on CUDA still multiplies in 8 bits (arXiv 2208.07339, section 3.2).
_OUTLIER_THRESHOLD = 6.0


@dataclass(frozen=True)
class QuantSpec:
    """A scheme with its settings; raises `InputError` for a combination that does not exist.

    scheme: `nf4` and `fp4` in blocks of `block_size`, with `double_quant` for 8-bit absmax; `int8` row-wise;
    `qint8`, `qint4`, `qint2` and `qfloat8` as optimum-quanto does them.
    skip: module names or globs that stay as they are: `lm_head`, `*.down_proj`, `model.layers.0`.
    """

    scheme: Scheme = "nf4"
    block_size: int = 64
    double_quant: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise InputError(f"unknown quantization scheme {self.scheme!r}", f"use one of {', '.join(SCHEMES)}")
        if self.four_bit_type is None and (self.double_quant or self.block_size != 64):
            hint = "leave these options out, or use nf4"
            raise InputError(f"{self.scheme} has neither a block size nor double quantization", hint)
        check_block_size(self.block_size)

    @property
    def four_bit_type(self) -> FourBitType | None:
        """The type of the four bits in bitsandbytes' serialization, or None."""
        return self.scheme if self.scheme == "nf4" or self.scheme == "fp4" else None

    @property
    def quanto_type(self) -> QuantoType | None:
        """The type in optimum-quanto's serialization, or None."""
        return cast(QuantoType, self.scheme) if self.scheme in QUANTO_TYPES else None

    def skips(self, module: str) -> bool:
        """Whether a module is to stay as it is: a pattern matches its name, the end of it, or a module around it.

        Matches begin and end at dots, so that `mlp.gate` does not skip `mlp.gate_proj`.
        """
        forms = ("{}", "*.{}", "{}.*", "*.{}.*")
        return any(fnmatchcase(module, form.format(pattern)) for pattern in self.skip for form in forms)

    def to_config(self, kept: Sequence[str], compute_dtype: str) -> dict[str, object]:
        """The `quantization_config` that transformers' BitsAndBytesConfig reads, for nf4, fp4 and int8.

        kept: every module that was not quantized (a given list replaces the reader's own default);
        compute_dtype: one of `DTYPES`, the dtype of the products.
        """
        config: dict[str, object] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": self.scheme != "int8",
            "load_in_8bit": self.scheme == "int8",
            "llm_int8_skip_modules": list(kept),
            "llm_int8_threshold": _OUTLIER_THRESHOLD,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "bnb_4bit_quant_type": self.four_bit_type or "fp4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
        }
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> "QuantSpec":
        """Read a `quantization_config`. Block sizes are not in it: each matrix brings its own.

        Raises `InputError` for another method's config and for values of the wrong kind.
        """
        method = config.get("quant_method", "bitsandbytes")
        if method != "bitsandbytes":
            raise InputError(
                f"config.json: quantization method {method!r} is not supported",
                "use the unquantized checkpoint, or one quantized with bitsandbytes",
            )
        skip = tuple(_names(config.get("llm_int8_skip_modules")))
        four, eight = (_flag(config, f"load_in_{bits}bit") for bits in (4, 8))
        if four == eight:
            raise InputError("config.json: quantization_config names not exactly one of 4 and 8 bits", _REPAIR)
        if eight:
            return cls("int8", skip=skip)
        scheme = config.get("bnb_4bit_quant_type", "fp4")
        if scheme not in get_args(FourBitType):
            raise InputError(f"config.json: bnb_4bit_quant_type {scheme!r} is unknown", _REPAIR)
        return cls(cast(Scheme, scheme), double_quant=_flag(config, "bnb_4bit_use_double_quant"), skip=skip)


_REPAIR = "repair its quantization_config, or use another copy of the checkpoint"


def _flag(config: Mapping[str, object], key: str) -> bool:
    """A boolean, false where absent; older files have some keys with a leading underscore only."""
    value = config.get(key, config.get(f"_{key}", False))
    if not isinstance(value, bool):
        raise InputError(f"config.json: quantization_config.{key} is {value!r}, not true or false", _REPAIR)
    return value


def _names(value: object) -> list[str]:
    """A list of module names; null is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InputError("config.json: quantization_config.llm_int8_skip_modules is no list of names", _REPAIR)
    return value
