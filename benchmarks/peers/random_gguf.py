"""A GGUF with random weights at a model's published size, in the types that llama.cpp's own quantizer picks.

The types are asked of `llama_model_quantize` on a narrow twin with as many layers and experts; then random blocks of
those types are written straight, so that no 16-bit copy of 14 GB is needed. It has no vocabulary: time it with token
ids. Needs the packages gguf and llama-cpp-python.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

ONES, MINUS_ONES, NORMAL = "ones", "minus ones", "normal"
# One block of each type: (values, bytes, offset of its float16 scales); the other bytes may be anything.
_BLOCKS = {Type.Q4_0: (32, 18, (0,)), Type.Q8_0: (32, 34, (0,)), Type.Q6_K: (256, 210, (208,))}
_CHUNK_BLOCKS = 1 << 17


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model: its shape as numpy has it, and what it is filled with; `matrix` may be quantized."""

    name: str
    shape: tuple[int, ...]
    fill: str = NORMAL
    matrix: bool = True


@dataclass(frozen=True)
class Sizes:
    """The widths and counts that both layouts are made of."""

    hidden: int
    inner: int
    layers: int
    vocab: int
    heads: int = 16
    experts: int = 64
    top_k: int = 8
    state: int = 16
    conv: int = 4
    rank: int = 256


OLMOE = Sizes(hidden=2048, inner=1024, layers=16, vocab=50304)
FALCON_MAMBA = Sizes(hidden=4096, inner=8192, layers=64, vocab=65024)
_NARROW_OLMOE = Sizes(hidden=256, inner=256, layers=16, vocab=512)
_NARROW_FALCON_MAMBA = Sizes(hidden=256, inner=512, layers=64, vocab=512, rank=256)


def _ends(sizes: Sizes) -> Iterator[Tensor]:
    yield Tensor("token_embd.weight", (sizes.vocab, sizes.hidden))
    yield Tensor("output_norm.weight", (sizes.hidden,), ONES, matrix=False)
    yield Tensor("output.weight", (sizes.vocab, sizes.hidden))


def olmoe(writer: gguf.GGUFWriter, sizes: Sizes) -> Iterator[Tensor]:
    """Metadata and tensors of an OLMoE."""
    writer.add_context_length(4096)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(sizes.experts)
    writer.add_expert_used_count(sizes.top_k)
    yield from _ends(sizes)
    hidden, inner, experts = sizes.hidden, sizes.inner, sizes.experts
    for layer in range(sizes.layers):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"):
            yield Tensor(f"{block}{norm}.weight", (hidden,), ONES, matrix=False)
        for name in ("q", "k", "v", "output"):
            yield Tensor(f"{block}attn_{name}.weight", (hidden, hidden))
        yield Tensor(f"{block}ffn_gate_inp.weight", (experts, hidden), matrix=False)
        yield Tensor(f"{block}ffn_gate_exps.weight", (experts, inner, hidden))
        yield Tensor(f"{block}ffn_up_exps.weight", (experts, inner, hidden))
        yield Tensor(f"{block}ffn_down_exps.weight", (experts, hidden, inner))


def falcon_mamba(writer: gguf.GGUFWriter, sizes: Sizes) -> Iterator[Tensor]:
    """Metadata and tensors of a FalconMamba."""
    writer.add_context_length(1 << 20)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(sizes.conv)
    writer.add_ssm_inner_size(sizes.inner)
    writer.add_ssm_state_size(sizes.state)
    writer.add_ssm_time_step_rank(sizes.rank)
    writer.add_ssm_dt_b_c_rms(True)
    yield from _ends(sizes)
    hidden, inner = sizes.hidden, sizes.inner
    for layer in range(sizes.layers):
        block = f"blk.{layer}."
        yield Tensor(f"{block}attn_norm.weight", (hidden,), ONES, matrix=False)
        yield Tensor(f"{block}ssm_in.weight", (2 * inner, hidden))
        yield Tensor(f"{block}ssm_conv1d.weight", (inner, sizes.conv), matrix=False)
        yield Tensor(f"{block}ssm_conv1d.bias", (inner,), ONES, matrix=False)
        yield Tensor(f"{block}ssm_x.weight", (sizes.rank + 2 * sizes.state, inner))
        yield Tensor(f"{block}ssm_dt.weight", (inner, sizes.rank))
        yield Tensor(f"{block}ssm_dt.bias", (inner,), ONES, matrix=False)
        yield Tensor(f"{block}ssm_a", (inner, sizes.state), MINUS_ONES, matrix=False)
        yield Tensor(f"{block}ssm_d", (inner,), ONES, matrix=False)
        yield Tensor(f"{block}ssm_out.weight", (hidden, inner))


Layout = Callable[[gguf.GGUFWriter, Sizes], Iterator[Tensor]]
# Our name: llama.cpp's architecture, the layout, the published sizes and the narrow twin's.
_FAMILIES: dict[str, tuple[str, Layout, Sizes, Sizes]] = {
    "olmoe": ("olmoe", olmoe, OLMOE, _NARROW_OLMOE),
    "falcon_mamba": ("mamba", falcon_mamba, FALCON_MAMBA, _NARROW_FALCON_MAMBA),
}


def write_random(family: str, path: Path) -> None:
    """Write the published size of "olmoe" or "falcon_mamba" in llama.cpp's Q4_0 mix."""
    architecture, layout, sizes, narrow = _FAMILIES[family]
    types = _quantizers_types(architecture, layout, narrow)
    partial = path.with_suffix(".partial")
    _write(partial, architecture, layout, sizes, gguf.LlamaFileType.MOSTLY_Q4_0, types)
    partial.replace(path)


def _quantizers_types(architecture: str, layout: Layout, narrow: Sizes) -> dict[str, Type]:
    """Which type llama.cpp gives each tensor when it quantizes the narrow twin to Q4_0."""
    import llama_cpp

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "f16.gguf", Path(folder) / "q4_0.gguf"
        _write(source, architecture, layout, narrow, gguf.LlamaFileType.MOSTLY_F16, {})
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
        if llama_cpp.llama_model_quantize(bytes(source), bytes(target), params):
            raise RuntimeError("llama.cpp did not quantize the narrow twin")
        return {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(target).tensors}


def _write(
    path: Path, architecture: str, layout: Layout, sizes: Sizes, file_type: gguf.LlamaFileType, types: dict[str, Type]
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    tensors = list(layout(writer, sizes))
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.inner if architecture == "olmoe" else 0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(sizes.vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(file_type)
    for tensor in tensors:
        _announce(writer, tensor, _type_of(tensor, types))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for tensor in tensors:
        writer.write_tensor_data(_data(tensor, _type_of(tensor, types), generator))
    writer.close()


def _type_of(tensor: Tensor, types: dict[str, Type]) -> Type:
    return types.get(tensor.name, Type.F16 if tensor.matrix else Type.F32)


def _announce(writer: gguf.GGUFWriter, tensor: Tensor, kind: Type) -> None:
    if kind in (Type.F16, Type.F32):
        dtype = np.dtype(np.float16 if kind == Type.F16 else np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, int(np.prod(tensor.shape)) * dtype.itemsize)
        return
    values, size, _ = _BLOCKS[kind]
    shape = (*tensor.shape[:-1], tensor.shape[-1] // values * size)
    writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kind)


def _data(tensor: Tensor, kind: Type, generator: np.random.Generator) -> np.ndarray:
    count = int(np.prod(tensor.shape))
    if kind in (Type.F16, Type.F32):
        dtype = np.float16 if kind == Type.F16 else np.float32
        if tensor.fill != NORMAL:
            return np.full(tensor.shape, 1 if tensor.fill == ONES else -1, dtype)
        noise = (generator.standard_normal(min(count, 1 << 20), np.float32) * 0.02).astype(dtype)
        return np.resize(noise, count).reshape(tensor.shape)
    values, size, scales = _BLOCKS[kind]
    blocks = generator.integers(0, 256, (min(count // values, _CHUNK_BLOCKS), size), np.uint8)
    for offset in scales:
        # Weights of about 0.02: four-bit values reach 8, eight-bit ones 127, a Q6_K's 32 times a scale of up to 127.
        scale = np.float16({Type.Q4_0: 4e-3, Type.Q8_0: 3e-4, Type.Q6_K: 1.5e-5}[kind])
        blocks[:, offset : offset + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    return np.resize(blocks, (count // values, size)).reshape(*tensor.shape[:-1], -1)


if __name__ == "__main__":
    write_random(sys.argv[1], Path(sys.argv[2]))
