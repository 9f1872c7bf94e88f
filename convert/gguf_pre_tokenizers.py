"""The ways of cutting text that a GGUF calls by name, as steps of a tokenizer.json.

Names: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp. Imports no torch.
"""

from lmx.core.jsonfile import JSON

Json = dict[str, JSON]

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _split(regex: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


GPT2: tuple[Json, ...] = (BYTE_LEVEL | {"use_regex": True},)
FALCON: tuple[Json, ...] = (
    {"type": "Punctuation", "behavior": "Contiguous"},
    BYTE_LEVEL | {"use_regex": True},
    {"type": "Digits", "individual_digits": False},
    _split("[0-9][0-9][0-9]"),
)
CL100K: tuple[Json, ...] = (_split(_CL100K), BYTE_LEVEL | {"use_regex": False})
NFC: Json = {"type": "NFC"}

# Name -> how text is cut, and how it is normalised first (GPT-NeoX's tokenizer and its heirs).
PRE_TOKENIZERS: dict[str, tuple[tuple[Json, ...], Json | None]] = {
    "gpt-2": (GPT2, None),
    "olmo": (GPT2, NFC),
    "mpt": (GPT2, NFC),
    "falcon": (FALCON, None),
    "dbrx": (CL100K, None),
    "llama-bpe": (CL100K, None),
    "llama3": (CL100K, None),
    "llama-v3": (CL100K, None),
}
# GGUFs of before May 2024 have no name
FAMILY = {"olmoe": "olmo", "dbrx": "dbrx", "falcon_mamba": "falcon", "mixtral": "gpt-2"}
