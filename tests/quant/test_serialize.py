import json

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file

from lmx.core.errors import InputError
from lmx.quant.four_bit import dequantize_4bit, quantize_4bit
from lmx.quant.int8 import dequantize_int8, quantize_int8
from lmx.quant.serialize import four_bit_tensors, int8_tensors, layout, read_four_bit, read_int8
from lmx.quant.spec import QuantSpec

NAME = "layers.0.proj.weight"
SPECS = [
    QuantSpec(quant_type, block_size=block_size, double_quant=double_quant)
    for quant_type in ("nf4", "fp4")
    for block_size in (64, 512)
    for double_quant in (False, True)
]


def weights(shape=(48, 192), dtype=torch.bfloat16):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def quantize(x, spec):
    return quantize_4bit(x, spec.four_bit_type, spec.block_size, spec.double_quant)


def reference_tensors(x, spec):
    """What bitsandbytes would save for this matrix under our name."""
    packed, state = bnb.quantize_4bit(
        x, blocksize=spec.block_size, quant_type=spec.four_bit_type, compress_statistics=spec.double_quant
    )
    return {NAME: packed} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}


def assert_same_four_bit(a, b):
    assert torch.equal(a.packed, b.packed)
    assert torch.equal(a.absmax, b.absmax)
    assert (a.quant_type, a.shape, a.dtype, a.block_size) == (b.quant_type, b.shape, b.dtype, b.block_size)
    assert torch.equal(a.scales(), b.scales())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_tensors_are_those_of_bitsandbytes(spec):
    x = weights()
    ours, theirs = four_bit_tensors(NAME, quantize(x, spec)), reference_tensors(x, spec)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        if "quant_state" in name:  # the same JSON, in the same order, and then spaces
            assert bytes(ours[name].tolist()).rstrip() == bytes(tensor.tolist())
        else:
            assert torch.equal(ours[name], tensor)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_bitsandbytes_reads_what_we_write(spec):
    x = weights()
    q = quantize(x, spec)
    tensors = four_bit_tensors(NAME, q)
    packed = tensors.pop(NAME)
    state = QuantState.from_dict({name.removeprefix(f"{NAME}."): t for name, t in tensors.items()}, torch.device("cpu"))
    assert state.shape == x.shape
    if x.shape[1] % spec.block_size == 0:
        assert torch.equal(bnb.dequantize_4bit(packed, state), dequantize_4bit(q))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_we_read_what_bitsandbytes_writes(spec):
    x = weights()
    assert_same_four_bit(read_four_bit(NAME, reference_tensors(x, spec)), quantize(x, spec))


@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_of_a_bitsandbytes_layer(double_quant):
    x = weights(dtype=torch.float16)
    layer = Linear4bit(192, 48, bias=False, quant_type="nf4", compress_statistics=double_quant)
    layer.load_state_dict({"weight": x})
    saved = {f"layers.0.proj.{name}": t for name, t in layer.to("cpu").state_dict().items()}
    # The layer held float32 before it was quantized, so its dtype is float32.
    assert_same_four_bit(read_four_bit(NAME, saved), quantize_4bit(x.float(), "nf4", 64, double_quant))


def test_state_dict_of_a_bitsandbytes_int8_layer():
    x = weights()
    layer = Linear8bitLt(192, 48, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": x})
    saved = {f"layers.0.proj.{name}": t for name, t in layer.to("cpu").state_dict().items()}
    ours = int8_tensors(NAME, quantize_int8(x))
    assert ours.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(ours[name], tensor)
        assert ours[name].dtype == tensor.dtype
    read = read_int8(NAME, saved, torch.bfloat16)
    assert torch.equal(dequantize_int8(read), dequantize_int8(quantize_int8(x)))


@pytest.mark.parametrize("spec", [*SPECS, QuantSpec("int8")], ids=str)
@pytest.mark.parametrize("shape", [(48, 192), (1, 1), (33, 77), (640, 320)])
def test_the_layout_is_known_before_the_data(spec, shape):
    x = weights(shape)
    if spec.scheme == "int8":
        tensors = int8_tensors(NAME, quantize_int8(x))
    else:
        tensors = four_bit_tensors(NAME, quantize(x, spec))
    found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert layout(NAME, shape, spec, x.dtype) == found


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_mapped_file_is_read_without_copies(spec, tmp_path):
    x = weights((33, 77))
    q = quantize(x, spec)
    save_file(four_bit_tensors(NAME, q), tmp_path / "m.safetensors")
    mapped = load_file(tmp_path / "m.safetensors")
    read = read_four_bit(NAME, mapped)
    assert_same_four_bit(read, q)
    assert read.packed.data_ptr() == mapped[NAME].data_ptr()
    assert read.absmax.data_ptr() == mapped[f"{NAME}.absmax"].data_ptr()


def test_packed_bytes_under_a_wider_dtype():
    q = quantize(weights(), SPECS[0])
    tensors = four_bit_tensors(NAME, q)
    tensors[NAME] = q.packed.view(-1).view(torch.bfloat16).unsqueeze(1)
    assert_same_four_bit(read_four_bit(NAME, tensors), q)


def with_state(tensors, **changes):
    """The same tensors with a changed quant_state; None removes a key."""
    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist())) | changes
    text = json.dumps({name: value for name, value in state.items() if value is not None})
    return tensors | {key: blob(text.encode())}


def blob(data):
    return torch.tensor(list(data), dtype=torch.uint8)


STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
BROKEN_FOUR_BIT = {
    "no state": lambda t: {k: v for k, v in t.items() if k != STATE},
    "no weight": lambda t: {k: v for k, v in t.items() if k != NAME},
    "no absmax": lambda t: {k: v for k, v in t.items() if k != f"{NAME}.absmax"},
    "no map": lambda t: {k: v for k, v in t.items() if k != f"{NAME}.quant_map"},
    "no nested map": lambda t: {k: v for k, v in t.items() if k != f"{NAME}.nested_quant_map"},
    "no nested absmax": lambda t: {k: v for k, v in t.items() if k != f"{NAME}.nested_absmax"},
    "two states": lambda t: t | {f"{NAME}.quant_state.bitsandbytes__fp4": t[STATE]},
    "weight cut": lambda t: t | {NAME: t[NAME][:-1]},
    "absmax cut": lambda t: t | {f"{NAME}.absmax": t[f"{NAME}.absmax"][:-1]},
    "absmax of another dtype": lambda t: t | {f"{NAME}.absmax": t[f"{NAME}.absmax"].float()},
    "nested absmax cut": lambda t: t | {f"{NAME}.nested_absmax": t[f"{NAME}.nested_absmax"][:-1]},
    "another map": lambda t: t | {f"{NAME}.quant_map": t[f"{NAME}.quant_map"].flip(0)},
    "short map": lambda t: t | {f"{NAME}.quant_map": t[f"{NAME}.quant_map"][:8]},
    "not a number in the map": lambda t: t | {f"{NAME}.quant_map": t[f"{NAME}.quant_map"] * float("nan")},
    "state too long": lambda t: t | {STATE: blob(b"{" + b" " * 5000 + b"}")},
    "state of floats": lambda t: t | {STATE: t[STATE].float()},
    "state no JSON": lambda t: t | {STATE: blob(b"\xff{]")},
    "state deep": lambda t: t | {STATE: blob(b"[" * 4000)},
    "state a list": lambda t: t | {STATE: blob(b"[]")},
    "state empty": lambda t: t | {STATE: blob(b"{}")},
    "another type": lambda t: with_state(t, quant_type="fp4"),
    "no shape": lambda t: with_state(t, shape=None),
    "larger shape": lambda t: with_state(t, shape=[49, 192]),
    "smaller shape": lambda t: with_state(t, shape=[47, 192]),
    "negative shape": lambda t: with_state(t, shape=[-48, -192]),
    "zero shape": lambda t: with_state(t, shape=[0, 192]),
    "enormous shape": lambda t: with_state(t, shape=[10**30, 192]),
    "fractional shape": lambda t: with_state(t, shape=[48.0, 192.0]),
    "true shape": lambda t: with_state(t, shape=[True, 48 * 192]),
    "deep shape": lambda t: with_state(t, shape=[48, 12, 16]),
    "shape a string": lambda t: with_state(t, shape="48192"),
    "block size 48": lambda t: with_state(t, blocksize=48),
    "block size 0": lambda t: with_state(t, blocksize=0),
    "block size a string": lambda t: with_state(t, blocksize="64"),
    "block size another": lambda t: with_state(t, blocksize=128),
    "dtype a module of torch": lambda t: with_state(t, dtype="hub"),
    "dtype int8": lambda t: with_state(t, dtype="int8"),
    "dtype a list": lambda t: with_state(t, dtype=["float16"]),
    "offset not a number": lambda t: with_state(t, nested_offset=float("nan")),
    "offset infinite": lambda t: with_state(t, nested_offset=float("inf")),
    "offset beyond float32": lambda t: with_state(t, nested_offset=1e300),
    "offset a string": lambda t: with_state(t, nested_offset="0.1"),
    "nested block size": lambda t: with_state(t, nested_blocksize=128),
    "nested dtype": lambda t: with_state(t, nested_dtype="float16"),
}


@pytest.mark.parametrize("case", BROKEN_FOUR_BIT)
def test_a_four_bit_matrix_that_does_not_fit_is_refused(case):
    tensors = four_bit_tensors(NAME, quantize_4bit(weights(), "nf4", 64, double_quant=True))
    assert read_four_bit(NAME, tensors).shape == (48, 192)
    with pytest.raises(InputError, match="layers.0.proj.weight".replace(".", r"\.")):
        read_four_bit(NAME, BROKEN_FOUR_BIT[case](tensors))


BROKEN_INT8 = {
    "no weight": lambda t: {k: v for k, v in t.items() if k != NAME},
    "no scales": lambda t: {k: v for k, v in t.items() if not k.endswith("SCB")},
    "scales cut": lambda t: t | {"layers.0.proj.SCB": torch.ones(47)},
    "scales of another dtype": lambda t: t | {"layers.0.proj.SCB": torch.ones(48).half()},
    "weight of another dtype": lambda t: t | {NAME: t[NAME].float()},
    "weight flat": lambda t: t | {NAME: t[NAME].flatten()},
    "another format": lambda t: t | {"layers.0.proj.weight_format": torch.tensor(2, dtype=torch.uint8)},
    "format a vector": lambda t: t | {"layers.0.proj.weight_format": torch.zeros(3, dtype=torch.uint8)},
    "format a float": lambda t: t | {"layers.0.proj.weight_format": torch.tensor(float("nan"))},
}


@pytest.mark.parametrize("case", BROKEN_INT8)
def test_an_int8_matrix_that_does_not_fit_is_refused(case):
    tensors = int8_tensors(NAME, quantize_int8(weights()))
    assert read_int8(NAME, tensors, torch.float16).shape == (48, 192)
    with pytest.raises(InputError, match=r"layers\.0\.proj\."):
        read_int8(NAME, BROKEN_INT8[case](tensors), torch.float16)
