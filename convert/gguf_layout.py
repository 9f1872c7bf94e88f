"""The types of tensors that a GGUF may hold, by their numbers, and what a block of each takes. Imports no torch.

Source: `enum ggml_type`, https://github.com/ggml-org/ggml/blob/master/include/ggml.h.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A type: `elements` numbers lie in `block_bytes` bytes. plain: safetensors' name of a type without blocks."""

    type_id: int
    name: str
    elements: int
    block_bytes: int
    plain: str | None = None


LAYOUTS = {
    layout.name: layout
    for layout in (
        BlockLayout(0, "F32", 1, 4, "F32"),
        BlockLayout(1, "F16", 1, 2, "F16"),
        BlockLayout(2, "Q4_0", 32, 18),
        BlockLayout(3, "Q4_1", 32, 20),
        BlockLayout(6, "Q5_0", 32, 22),
        BlockLayout(7, "Q5_1", 32, 24),
        BlockLayout(8, "Q8_0", 32, 34),
        BlockLayout(12, "Q4_K", 256, 144),
        BlockLayout(13, "Q5_K", 256, 176),
        BlockLayout(14, "Q6_K", 256, 210),
        BlockLayout(20, "IQ4_NL", 32, 18),
        BlockLayout(30, "BF16", 1, 2, "BF16"),
    )
}
BY_ID = {layout.type_id: layout for layout in LAYOUTS.values()}

UNREAD = {
    10: "Q2_K", 11: "Q3_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
"""Types that exist and that lmx does not read."""
