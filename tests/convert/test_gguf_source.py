"""GGUFs that lmx writes and reads: bit-equal where the formats allow it, within a block's rounding where not."""

import itertools
import json
import struct
import subprocess
import sys

import pytest
import torch
from families import config_of, write_family, write_tensors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmx.api import open_folder
from lmx.convert.gguf_header import TensorEntry, write_header
from lmx.convert.gguf_layout import LAYOUTS
from lmx.convert.gguf_source import GGUFCheckpoint, find_gguf
from lmx.convert.gguf_target import Options, predict_gguf, write_gguf
from lmx.convert.gguf_types import largest_error
from lmx.convert.plain import Options as PlainOptions
from lmx.convert.plain import write_plain
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import ConflictError, InputError, UsageError
from lmx.core.loader import load_model
from lmx.dtypes import main_dtype

FAMILIES = ["mixtral", "olmoe", "dbrx", "falcon_mamba"]
KINDS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
IDS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))


def to_gguf(source, target, kind, **options):
    *steps, last = write_gguf(source, target, Options(kind, tokenizer=target.parent, **options))
    assert steps[-1].parameters == steps[-1].total == last.parameters
    assert last.output_bytes == target.stat().st_size
    return last


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_equal(family, dtype, tmp_path):
    # transformers runs DBRX with the rotary base of a top-level key alone, which a config made by lmx has
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}} if family == "dbrx" else {}
    source = Checkpoint.open(write_family(tmp_path / "source", family, dtype, **rope))
    to_gguf(source, tmp_path / "x.gguf", KINDS[dtype])
    opened = GGUFCheckpoint.open(tmp_path / "x.gguf")
    assert main_dtype(opened) == KINDS[dtype]
    *_, last = write_plain(opened, tmp_path / "back", PlainOptions(dtype))
    assert last.parameters == source.parameters
    before, after = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if dtype is torch.float32 and name.endswith("A_log"):  # a logarithm of an exponential: not the last bit
            torch.testing.assert_close(after[name], tensor, rtol=3e-7, atol=2e-7)
        else:
            assert torch.equal(after[name], tensor), name
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert theirs.dtype == dtype
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=dtype)
    if dtype is not torch.float32 or family != "falcon_mamba":
        assert torch.equal(logits_of(theirs), logits_of(original))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_come_back_within_their_rounding(family, kind, tmp_path):
    source = Checkpoint.open(write_family(tmp_path / "source", family))
    to_gguf(source, tmp_path / "x.gguf", kind)
    opened = GGUFCheckpoint.open(tmp_path / "x.gguf")
    assert opened.main_dtype == "BF16"
    assert opened.quantization == f"{kind} (GGUF)"
    list(write_plain(opened, tmp_path / "back", PlainOptions(torch.float32)))
    after, blocks = tensors_of(tmp_path / "back"), 0
    for name, tensor in tensors_of(tmp_path / "source").items():
        wanted, got = tensor.float(), after[name]
        if not torch.equal(wanted, got) and not name.endswith("A_log"):
            if family == "dbrx" and name.endswith("w2"):  # blocks run along the reduction, which is stored upright here
                wanted, got = (x.view(4, 128, 64).transpose(1, 2).contiguous() for x in (wanted, got))
            wanted, got = wanted.reshape(-1, 32), got.reshape(-1, 32)
            layout = LAYOUTS["Q8_0" if "emb" in name or "wte" in name or "lm_head" in name else kind]
            assert ((got - wanted).abs() <= largest_error(layout, wanted)).all(), name
            blocks += 1
    assert blocks >= 8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_runs_as_its_source_does(family, tmp_path):
    source = Checkpoint.open(write_family(tmp_path / "source", family, torch.float32))
    to_gguf(source, tmp_path / "x.gguf", "F32")
    ours = load_model(GGUFCheckpoint.open(tmp_path / "x.gguf"))
    torch.testing.assert_close(logits_of(ours), logits_of(load_model(source)), rtol=0, atol=1e-6)


def test_plain_tensors_are_views_of_the_file(tmp_path):
    source = Checkpoint.open(write_family(tmp_path / "source", "olmoe"))
    to_gguf(source, tmp_path / "x.gguf", "BF16")
    opened = GGUFCheckpoint.open(tmp_path / "x.gguf")
    experts = [opened.tensor(f"model.layers.0.mlp.experts.{n}.up_proj.weight") for n in range(4)]
    distances = {b.data_ptr() - a.data_ptr() for a, b in itertools.pairwise(experts)}
    assert distances == {64 * 64 * 2}
    assert opened.mapped_bytes("BF16") > 0.9 * opened.total_bytes


def test_the_config_survives(tmp_path):
    for family in FAMILIES:
        folder = write_family(tmp_path / family, family)
        to_gguf(Checkpoint.open(folder), tmp_path / f"{family}.gguf", "F16")
        ours = load_model(GGUFCheckpoint.open(tmp_path / f"{family}.gguf")).config
        theirs = load_model(Checkpoint.open(folder)).config
        different = {key for key, value in vars(theirs).items() if vars(ours)[key] != value}
        # what no forward pass reads, and the context of a model that has none
        assert different <= {"initializer_range", "router_aux_loss", "ffn", "attention"}, (family, different)


def test_a_half_written_file_is_continued(tmp_path, monkeypatch):
    monkeypatch.setattr("lmx.convert.single_file._KEEP_BYTES", 20_000)
    source = Checkpoint.open(write_family(tmp_path / "source", "mixtral"))
    to_gguf(source, tmp_path / "whole.gguf", "BF16", name="x")
    steps = write_gguf(source, tmp_path / "x.gguf", Options("BF16", tmp_path, "x"))
    for _ in range(9):
        next(steps)
    steps.close()
    assert not (tmp_path / "x.gguf").exists()
    again = list(write_gguf(source, tmp_path / "x.gguf", Options("BF16", tmp_path, "x")))
    assert len(again) < len(list(opened_names(tmp_path / "whole.gguf"))) - 3
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not (tmp_path / "x.gguf.partial").exists()


def opened_names(path):
    from lmx.convert.gguf_header import read_header

    with path.open("rb") as file:
        yield from (entry.name for entry in read_header(file.fileno(), path).tensors)


def test_an_existing_file_is_replaced_only_with_force(tmp_path):
    source = Checkpoint.open(write_family(tmp_path / "source", "olmoe"))
    (tmp_path / "x.gguf").write_bytes(b"mine")
    with pytest.raises(ConflictError):
        to_gguf(source, tmp_path / "x.gguf", "F16")
    assert (tmp_path / "x.gguf").read_bytes() == b"mine"
    predicted = predict_gguf(source, tmp_path / "x.gguf", Options("F16", tmp_path, force=True))
    assert to_gguf(source, tmp_path / "x.gguf", "F16", force=True) == predicted
    with pytest.raises(UsageError):
        to_gguf(source, tmp_path / "x.bin", "F16")


def test_what_llama_cpp_does_otherwise_is_refused(tmp_path):
    for family, changes, words in (
        ("mixtral", {"sliding_window": 8}, "sliding_window"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("dbrx", {"ffn_config": {**config_of("dbrx")["ffn_config"], "moe_normalize_expert_weights": 2.0}}, "normalize"),
        ("falcon_mamba", {"intermediate_size": 192}, "intermediate_size"),
        ("recurrent_gemma", {}, "recurrent_gemma"),
    ):
        source = Checkpoint.open(write_family(tmp_path / family, family, **changes))
        with pytest.raises(InputError, match=words):
            to_gguf(source, tmp_path / "x.gguf", "F16")


def test_values_that_do_not_fit_are_refused(tmp_path):
    folder = write_family(tmp_path / "source", "olmoe", torch.float32)
    tensors = load_file(folder / "model.safetensors")
    for value, words in ((1e6, "beyond F16"), (float("nan"), "NaN")):
        tensors["lm_head.weight"][0, 0] = value
        write_tensors(folder, config_of("olmoe"), tensors)
        with pytest.raises(InputError, match=words):
            to_gguf(Checkpoint.open(folder), tmp_path / "x.gguf", "F16")
        assert not (tmp_path / "x.gguf").exists()


def test_the_files_of_a_split_model(tmp_path):
    """As llama.cpp's gguf-split names and numbers them: all keys in the first file, tensors dealt out."""
    source = Checkpoint.open(write_family(tmp_path / "source", "dbrx"))
    to_gguf(source, tmp_path / "x.gguf", "BF16")
    split(tmp_path / "x.gguf", tmp_path / "split", 3)
    whole, parts = GGUFCheckpoint.open(tmp_path / "x.gguf"), open_folder(tmp_path / "split")
    assert whole.infos.keys() == parts.infos.keys()
    assert all(torch.equal(whole.tensor(name), parts.tensor(name)) for name in whole.infos)
    assert len(parts.files) == 3
    (tmp_path / "split/m-00002-of-00003.gguf").rename(tmp_path / "split/other")
    with pytest.raises(Exception, match="does not exist"):
        open_folder(tmp_path / "split")


def split(path, folder, count):
    from lmx.convert.gguf_header import read_header

    with path.open("rb") as file:
        header = read_header(file.fileno(), path)
    data, folder = path.read_bytes(), folder
    folder.mkdir()
    for number in range(count):
        entries, parts, end = [], [], 0
        for entry in header.tensors[number::count]:
            layout = next(layout for layout in LAYOUTS.values() if layout.type_id == entry.type_id)
            size = -(-entry.elements // layout.elements * layout.block_bytes // 32) * 32
            parts.append(data[header.data_start + entry.offset :][:size])
            entries.append(TensorEntry(entry.name, entry.shape, entry.type_id, end))
            end += size
        keys = {**(header.metadata if number == 0 else {}), "split.no": number, "split.count": count}
        start = write_header(keys, tuple(entries), 32)
        (folder / f"m-{number + 1:05}-of-{count:05}.gguf").write_bytes(start + b"".join(parts))


def test_a_folder_with_one_gguf_is_that_model(tmp_path):
    assert find_gguf(tmp_path) is None
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3))
    assert find_gguf(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(InputError, match="2 GGUFs"):
        find_gguf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_gguf(tmp_path) is None


def test_mixtrals_first_ggufs_kept_experts_apart(tmp_path):
    source = Checkpoint.open(write_family(tmp_path / "source", "mixtral"))
    to_gguf(source, tmp_path / "x.gguf", "BF16")
    whole = GGUFCheckpoint.open(tmp_path / "x.gguf")
    entries, data = [], []
    for name, rule in old_names():
        tensor, end = whole.tensor(name), sum(map(len, data))
        stored = tensor.float() if rule.endswith("norm.weight") or rule.endswith("inp.weight") else tensor
        if ".attn_q." in rule or ".attn_k." in rule:
            stored = stored.view(4 if "q" in rule else 2, 2, -1, 64).transpose(1, 2).reshape(stored.shape)
        kind = LAYOUTS["F32" if stored.dtype is torch.float32 else "BF16"]
        entries.append(TensorEntry(rule, tuple(stored.shape), kind.type_id, end))
        data.append(stored.contiguous().view(torch.uint8).numpy().tobytes())
    (tmp_path / "old.gguf").write_bytes(write_header(whole.header, tuple(entries), 32) + b"".join(data))
    old = GGUFCheckpoint.open(tmp_path / "old.gguf")
    assert old.infos.keys() == whole.infos.keys()
    assert all(torch.equal(whole.tensor(name), old.tensor(name)) for name in whole.infos)


def old_names():
    from lmx.convert.gguf_names import MIXTRAL, Change

    for rule, indices in MIXTRAL.expand(2):
        if rule.change is Change.EXPERTS:
            for expert in range(4):
                yield (
                    rule.hub.format(*indices, expert),
                    rule.gguf.format(*indices).replace("_exps.", f".{expert}."),
                )
        else:
            yield rule.hub.format(*indices), rule.gguf.format(*indices)


def test_the_small_files_vanish_with_the_checkpoint(tmp_path):
    source = Checkpoint.open(write_family(tmp_path / "source", "olmoe"))
    to_gguf(source, tmp_path / "x.gguf", "BF16")
    opened = GGUFCheckpoint.open(tmp_path / "x.gguf")
    folder = opened.folder
    assert json.loads((folder / "config.json").read_text())["model_type"] == "olmoe"
    del opened
    assert not folder.exists()


PEAK = """
import sys
from pathlib import Path
from lmx.conversion import Conversion
from lmx.convert.verify import compare_weights
from lmx.api import open_folder
from lmx.quant.memory import peak_memory_bytes
source, folder, tiny = map(Path, sys.argv[1:])
list(Conversion(folder / "tiny.gguf", dtype="q8_0").run(open_folder(tiny), "x"))
print(peak_memory_bytes())
list(Conversion(folder / "m.gguf", dtype="q8_0").run(open_folder(source), "x"))
list(Conversion(folder / "back").run(open_folder(folder / "m.gguf"), "x"))
list(compare_weights(open_folder(folder / "m.gguf"), open_folder(folder / "back")))
print(peak_memory_bytes())
"""


def test_memory_is_a_few_of_the_largest_tensors(tmp_path):
    """Mapped pages counted: 200 MB there, back and compared, in tensors of 8 MB with 8 experts each."""
    ffn = {"ffn_hidden_size": 1024, "moe_num_experts": 8, "moe_top_k": 2}
    source = write_family(tmp_path / "source", "dbrx", d_model=512, n_layers=8, ffn_config=ffn)
    largest = max(info.nbytes for info in Checkpoint.open(source).infos.values())
    assert Checkpoint.open(source).total_bytes > 24 * largest
    tiny = write_family(tmp_path / "tiny", "dbrx")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(source), str(tmp_path), str(tiny)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after - before < 4 * largest + (48 << 20)


LOAD = """
import sys
from pathlib import Path
from lmx.api import choose_spec, load_core, open_folder
from lmx.memory import made_bytes
from lmx.quant.memory import peak_memory_bytes
import torch
tiny, large = (open_folder(Path(path)) for path in sys.argv[1:3])
scheme = None if sys.argv[3] == "plain" else sys.argv[3]
kind, here = torch.bfloat16, torch.device("cpu")
load_core(tiny, choose_spec(scheme), "causal", None, kind, here)
before = peak_memory_bytes()
model = load_core(large, choose_spec(scheme), "causal", None, kind, here)
print(peak_memory_bytes() - before, made_bytes(large, kind, scheme))
"""


@pytest.mark.parametrize("scheme", ["plain", "nf4"])
def test_loading_takes_the_memory_that_is_said(scheme, tmp_path):
    """100 million parameters in experts of 8 MB as float32, of which none may stay, nor leave its room unused."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_local_experts": 8}
    for name, changes in (("tiny", {}), ("large", sizes)):
        source = Checkpoint.open(write_family(tmp_path / name, "mixtral", **changes))
        to_gguf(source, tmp_path / f"{name}.gguf", "Q8_0")
    paths = [str(tmp_path / f"{name}.gguf") for name in ("tiny", "large")]
    done = subprocess.run([sys.executable, "-c", LOAD, *paths, scheme], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    taken, said = map(int, done.stdout.split())
    assert taken < 1.1 * said + (64 << 20)
