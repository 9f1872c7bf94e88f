"""optimum-quanto's types, bit for bit, and its checkpoints, there and back."""

import json
from functools import cache
from importlib.util import find_spec, module_from_spec
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from optimum import quanto
from optimum.quanto.library.extensions.cpp import ext
from optimum.quanto.nn import QLinear
from optimum.quanto.tensor.packed import pack_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, FalconMambaConfig, MixtralConfig, RecurrentGemmaConfig

from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError, UsageError
from lmx.core.loader import load_model
from lmx.quant.apply import load_quantized, quantize_matrix
from lmx.quant.matmul import choose_product, dequantize
from lmx.quant.modules import QuantExpertBank, QuantHead, QuantLinear
from lmx.quant.quantize import Options, predict, quantize
from lmx.quant.quanto import QUANTO_TYPES, dequantize_rows, group_size, quantize_quanto, unpack_groups
from lmx.quant.quanto_files import quanto_layout, quanto_tensors, read_quanto
from lmx.quant.report import Finished
from lmx.quant.spec import QuantSpec
from lmx.quant.stored import DequantizedSource, StoredMatrices

NAME = "model.layers.0.mixer.in_proj.weight"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PACKED = ["qint4", "qint2"]
# (64, 320): groups of 64; (9, 100): below a group; (7, 1001): no group fits, and rows end inside a byte
SHAPES = [(64, 256), (64, 320), (33, 96), (9, 100), (7, 1001), (5, 160), (640, 4096)]
CONFIGS = {
    "falcon_mamba": FalconMambaConfig(
        vocab_size=70, hidden_size=64, num_hidden_layers=2, intermediate_size=160, state_size=8, time_step_rank=64
    ),
    "recurrent_gemma": RecurrentGemmaConfig(
        vocab_size=70,
        hidden_size=96,
        num_hidden_layers=3,
        intermediate_size=384,
        num_attention_heads=3,
        num_key_value_heads=1,
        lru_width=96,
        attention_window_size=16,
    ),
    "mixtral": MixtralConfig(
        vocab_size=70,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    ),
}
DENSE = ["falcon_mamba", "recurrent_gemma"]
IDS = torch.randint(3, 70, (2, 21), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def unpack_in_python(monkeypatch):
    """optimum-quanto's own Python code instead of its extension, which it would compile for a minute or two."""
    monkeypatch.setattr(ext, "_lib", SimpleNamespace(unpack=python_unpack()))


@cache
def python_unpack():
    """`unpack` of optimum.quanto.library.unpack, which its registration with torch takes out of the module's reach."""
    spec = find_spec("optimum.quanto.library.unpack")
    module = module_from_spec(spec)
    with patch("torch.library.define"), patch("torch.library.impl", lambda *_: lambda function: function):
        spec.loader.exec_module(module)
    return module.unpack


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint of every config, by transformers."""
    folders = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(2)
        folders[name] = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 2:
                    weight.mul_(4)
        model.save_pretrained(folders[name])
    return folders


def weights(shape, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 8).to(dtype)


def frozen_layer(x, quant_type):
    """What optimum-quanto makes of a linear layer, before it picks a kernel's own layout for the CPU."""
    layer = nn.Linear(x.shape[1], x.shape[0], bias=False, dtype=x.dtype)
    layer.weight = nn.Parameter(x, requires_grad=False)
    layer = QLinear.from_module(layer, weights=getattr(quanto, quant_type))
    if quant_type not in PACKED:
        return layer.qweight
    size = layer.weight_group_size
    scale, shift = layer.optimizer(x, qtype=layer.weight_qtype, axis=0, group_size=size)
    return quanto.quantize_weight(x, layer.weight_qtype, 0, scale=scale, shift=shift, group_size=size, optimized=False)


def state_of(weight):
    state = {}
    weight.save_to_state_dict(state, f"{NAME}.", keep_vars=False)
    return state


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_of(a), bits_of(b))


def bits_of(x):
    return x.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANTO_TYPES)
def test_bit_equal_with_optimum_quanto(quant_type, shape, dtype):
    x = weights(shape, dtype)
    theirs, ours = frozen_layer(x, quant_type), quantize_quanto(x, quant_type)
    found, expected = quanto_tensors(NAME, ours), state_of(theirs)
    assert expected.keys() == {name for name in found if "put_scale" not in name}
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name
    assert same_bits(dequantize(ours), theirs.dequantize())
    assert {name: (t.dtype, tuple(t.shape)) for name, t in found.items()} == quanto_layout(
        NAME, shape, quant_type, dtype
    )
    read = read_quanto(NAME, found, shape)
    assert (read.quant_type, read.shape, read.dtype) == (quant_type, shape, dtype)
    assert read.data.data_ptr() == ours.data.data_ptr()
    assert same_bits(dequantize(read), theirs.dequantize())


@pytest.mark.parametrize("quant_type", QUANTO_TYPES)
def test_zeros_constants_and_tiny_numbers(quant_type):
    x = weights((6, 192), torch.float16)
    x[0], x[1], x[2, :96], x[3] = 0, 0.5, 0, x[3] * 1e-7
    ours, theirs = quantize_quanto(x, quant_type), frozen_layer(x, quant_type)
    values, expected = dequantize(ours), theirs.dequantize()
    assert (values[0] == 0).all()
    assert values.isfinite().all()
    finite = expected.isfinite()  # a row of zeros in qfloat8 is NaN there
    assert torch.equal(values[finite], expected[finite])
    assert finite[1:3].all()


def test_a_single_row_has_a_scalar_scale():
    for quant_type in ("qint8", "qfloat8"):
        ours, theirs = quantize_quanto(weights((1, 300)), quant_type), frozen_layer(weights((1, 300)), quant_type)
        found = quanto_tensors(NAME, ours)
        for name, tensor in state_of(theirs).items():
            assert same_bits(found[name], tensor)
        assert same_bits(dequantize(read_quanto(NAME, found)), theirs.dequantize())


def test_group_sizes_are_those_of_optimum_quanto():
    for columns in range(1, 1100):
        layer = QLinear(columns, 2, bias=False, weights=quanto.qint4, device="meta")
        assert group_size(columns) == (layer.weight_group_size or columns)


@pytest.mark.parametrize("quant_type", PACKED)
@pytest.mark.parametrize("groups", [3, 4, 5, 6, 7, 8, 9, 1000])
def test_any_run_of_groups_is_unpacked(quant_type, groups):
    bits = 4 if quant_type == "qint4" else 2
    codes = torch.randint(0, 1 << bits, (groups, 5), dtype=torch.uint8)
    packed = pack_weights(codes, bits)
    for first, last in [(0, groups), (1, groups), (groups // 2, groups // 2 + 1), (groups - 1, groups), (0, 2)]:
        assert torch.equal(unpack_groups(packed, bits, first, last), codes[first:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANTO_TYPES)
def test_products_and_their_gradients(quant_type, dtype):
    q = quantize_quanto(weights((300, 1280)), quant_type)
    x = weights((3, 1280), dtype).requires_grad_()
    out = choose_product(q)(x)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    exact = x.detach().double() @ dequantize(q, torch.float64).t()
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(
        grad[0].double(), dequantize(q, torch.float64).sum(0), rtol=tolerance, atol=10 * tolerance
    )
    assert torch.equal(dequantize_rows(q, 7, 9), dequantize(q)[7:9])


@pytest.mark.parametrize("quant_type", QUANTO_TYPES)
def test_what_cannot_be_quantized_is_refused(quant_type):
    for value in (float("nan"), float("inf"), -float("inf")):
        x = weights((8, 64))
        x[5, 3] = value
        with pytest.raises(InputError, match=r"here\.w holds NaN or infinity"):
            quantize_quanto(x, quant_type, "here.w")
    for x in (torch.ones(8), torch.ones(4, 4, dtype=torch.int8), torch.ones(0, 4)):
        with pytest.raises(InputError, match=r"here\.w"):
            quantize_quanto(x, quant_type, "here.w")


def test_what_the_packed_format_cannot_hold_is_refused():
    for shape in [(1, 64), (2, 96), (1, 256)]:
        with pytest.raises(InputError, match="too small"):
            quantize_quanto(weights(shape), "qint4")
    x = weights((8, 64), torch.float16)
    x[2, :2] = torch.tensor([60000.0, -60000.0])
    with pytest.raises(InputError, match="wider range"):
        quantize_quanto(x, "qint2")


def run(folder, target, scheme, **options):
    *_, last = quantize(Checkpoint.open(folder), target, QuantSpec(scheme), Options(**options))
    assert isinstance(last, Finished)
    return last.report


def tensors_of(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@torch.no_grad()
def logits_of(model):
    return model.eval()(IDS).logits.float()


def requantized(folder, config):
    """The folder as optimum-quanto loads it."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    quanto.requantize(model, tensors_of(folder), json.loads((folder / "quanto_qmap.json").read_text()))
    model.tie_weights()
    return model


@pytest.mark.parametrize("quant_type", QUANTO_TYPES)
@pytest.mark.parametrize("family", DENSE)
def test_requantize_loads_our_files(family, quant_type, plain, tmp_path):
    """The same logits there, here on the codes, and here dequantized."""
    report = run(plain[family], tmp_path / "out", quant_type, max_shard_bytes=100_000)
    theirs = requantized(tmp_path / "out", AutoConfig.from_pretrained(tmp_path / "out"))
    assert sum(isinstance(module, QLinear) for module in theirs.modules()) == len(report.error) > 3
    ours = load_quantized(Checkpoint.open(tmp_path / "out"))
    assert sum(isinstance(module, QuantLinear) for module in ours.modules()) == len(report.error)
    expected = logits_of(theirs)
    torch.testing.assert_close(logits_of(ours), expected, rtol=0, atol=1e-4)
    worth = load_model(DequantizedSource(Checkpoint.open(tmp_path / "out")))
    torch.testing.assert_close(logits_of(worth), expected, rtol=0, atol=1e-4)
    assert torch.equal(logits_of(quanto.QuantizedModelForCausalLM.from_pretrained(tmp_path / "out")), expected)
    assert (logits_of(load_model(Checkpoint.open(plain[family]))) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("quant_type", QUANTO_TYPES)
@pytest.mark.parametrize("family", CONFIGS)
def test_files_of_optimum_quanto_run(family, quant_type, plain, tmp_path):
    """It quantizes every linear layer: routers, step sizes and the output head too."""
    model = AutoModelForCausalLM.from_pretrained(plain[family])
    quanto.quantize(model, weights=getattr(quanto, quant_type))
    quanto.freeze(model)
    expected = logits_of(model)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((plain[family] / "config.json").read_text())
    ours = load_quantized(Checkpoint.open(tmp_path))
    assert isinstance(ours.head, QuantHead)
    worth = load_model(DequantizedSource(Checkpoint.open(tmp_path)))
    for model in (ours, worth):
        logits = logits_of(model)
        assert logits.isfinite().all()
        # The embedding of RecurrentGemma's padding token is zero: as a row of a qfloat8 head it is NaN there.
        good = expected.isfinite()
        assert good[..., 1:].all()
        torch.testing.assert_close(logits[good], expected[good], rtol=0, atol=1e-4)


@pytest.mark.parametrize("quant_type", QUANTO_TYPES)
def test_experts_are_quantized_one_by_one(quant_type, plain, tmp_path):
    folder, spec = plain["mixtral"], QuantSpec(quant_type)
    predicted = predict(Checkpoint.open(folder), tmp_path / "out", spec)
    report = run(folder, tmp_path / "out", quant_type)
    assert predicted.output_bytes == report.output_bytes == (tmp_path / "out/model.safetensors").stat().st_size
    assert len(report.error) == 2 * (4 + 3 * 4)
    source = Checkpoint.open(tmp_path / "out")
    assert source.is_quantized
    assert "quantization_config" not in source.config
    stored, dequantized = StoredMatrices.read(source), DequantizedSource(source)
    original = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    matrix = stored.matrices[name]
    theirs = frozen_layer(original["model.layers.1.mlp.experts.down_proj"][2], quant_type)
    assert same_bits(dequantized.tensor(name), theirs.dequantize())
    assert dequantized.infos[name].shape == matrix.shape == tuple(theirs.shape)
    loaded = load_quantized(source)
    banks = [module for module in loaded.modules() if isinstance(module, QuantExpertBank)]
    assert banks[1].down[2].data.data_ptr() == matrix.data.data_ptr()
    while_loading = load_quantized(Checkpoint.open(folder), spec=spec)
    assert torch.equal(logits_of(loaded), logits_of(while_loading))
    worth = load_model(dequantized)
    torch.testing.assert_close(logits_of(worth), logits_of(loaded), rtol=0, atol=1e-4)


def test_a_stopped_run_goes_on_to_the_same_bytes(plain, tmp_path):
    folder, options = plain["falcon_mamba"], Options(max_shard_bytes=50_000)
    run(folder, tmp_path / "whole", "qint4", max_shard_bytes=50_000)
    events = quantize(Checkpoint.open(folder), tmp_path / "out", QuantSpec("qint4"), options)
    next(event for event in events if event.parameters > event.total / 2)
    events.close()
    assert not (tmp_path / "out").exists()
    first, *_, last = quantize(Checkpoint.open(folder), tmp_path / "out", QuantSpec("qint4"), options)
    assert first.resumed > 0
    assert isinstance(last, Finished)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def test_the_map_is_the_one_that_optimum_quanto_writes(plain, tmp_path):
    run(plain["falcon_mamba"], tmp_path / "out", "qfloat8")
    model = AutoModelForCausalLM.from_pretrained(plain["falcon_mamba"])
    quanto.quantize(model, weights=quanto.qfloat8, exclude=["lm_head", "*.dt_proj"])
    quanto.freeze(model)
    assert json.loads((tmp_path / "out/quanto_qmap.json").read_text()) == quanto.quantization_map(model)
    theirs = {name for name in model.state_dict() if name != "lm_head.weight"}
    assert tensors_of(tmp_path / "out").keys() == theirs


def test_quantized_files_are_not_quantized_again(plain, tmp_path):
    run(plain["mixtral"], tmp_path / "out", "qint4")
    with pytest.raises(InputError, match="quantized already"):
        run(tmp_path / "out", tmp_path / "again", "qint4")
    with pytest.raises(UsageError, match="quantized already"):
        load_quantized(Checkpoint.open(tmp_path / "out"), spec=QuantSpec("qint8"))


EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1"
DAMAGE = {
    "no scale": lambda t: t.pop(f"{EXPERT}.weight._scale"),
    "no shift": lambda t: t.pop(f"{EXPERT}.weight._shift"),
    "no codes": lambda t: t.pop(f"{EXPERT}.weight._data._data"),
    "fewer scales": lambda t: t.update({f"{EXPERT}.weight._scale": torch.ones(3, 1)}),
    "scales of integers": lambda t: t.update({f"{EXPERT}.weight._scale": t[f"{EXPERT}.weight._scale"].to(torch.int32)}),
    "fewer codes": lambda t: t.update({f"{EXPERT}.weight._data._data": t[f"{EXPERT}.weight._data._data"][1:].clone()}),
    "codes of 16 bits": lambda t: t.update(
        {f"{EXPERT}.weight._data._data": t[f"{EXPERT}.weight._data._data"].to(torch.int16)}
    ),
    "a matrix of another model": lambda t: t.update({"model.layers.0.mlp.weight._data._data": torch.ones(4, 4)}),
    "activations": lambda t: t.update({f"{EXPERT}.input_scale": torch.tensor(0.5)}),
    "a stray shift": lambda t: t.update({"model.norm.weight._shift": torch.ones(64, 1)}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(damage, plain, tmp_path):
    run(plain["mixtral"], tmp_path / "out", "qint4")
    tensors = tensors_of(tmp_path / "out")
    DAMAGE[damage](tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((plain["mixtral"] / "config.json").read_text())
    with pytest.raises(InputError):
        load_quantized(Checkpoint.open(tmp_path))


def test_a_type_that_is_unknown_is_refused():
    tensors = quanto_tensors(NAME, quantize_quanto(weights((4, 8)), "qfloat8"))
    tensors[f"{NAME}._data"] = tensors[f"{NAME}._data"].to(torch.float8_e5m2)
    with pytest.raises(InputError, match="float8_e5m2"):
        read_quanto(NAME, tensors)


def test_settings_of_other_schemes_are_refused():
    with pytest.raises(InputError, match="qint4 has neither"):
        QuantSpec("qint4", block_size=128)
    with pytest.raises(InputError, match="qfloat8 has neither"):
        QuantSpec("qfloat8", double_quant=True)
    assert quantize_matrix(weights((4, 64)), QuantSpec("qint2")).quant_type == "qint2"
