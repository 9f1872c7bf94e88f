"""`lmx convert` with GGUFs and `--verify`, and a GGUF as MODEL of the other commands."""

import json
import shutil
from functools import partial

import pytest
import torch
from families import write_family
from safetensors.torch import load_file, save_file
from support import SHARED, needs_shared

import lmx as library
from lmx.api import open_checkpoint, open_folder
from lmx.cli.facts import human_bytes
from lmx.conversion import Conversion
from lmx.core import ceilings
from lmx.core.errors import ConflictError, UsageError
from lmx.memory import made_bytes
from lmx.verification import Verification, verify


@pytest.fixture
def run(lmx):
    """Run a command that succeeds; returns the JSON it prints."""

    def succeed(*args):
        done = lmx(*args)
        assert done.code == 0, done.err
        return json.loads(done.out)

    return succeed


def convert(source, target, **options):
    opened = open_checkpoint(source)
    job = Conversion(target, **options)
    *_, last = job.run(opened, "m")
    return last


def verified(source, target, dtype=None):
    opened = open_checkpoint(source)
    *_, report = verify(opened, Conversion(target, dtype=dtype).source(opened), open_checkpoint(target))
    assert isinstance(report, Verification)
    return report


@needs_shared
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "dbrx", "falcon_mamba"])
def test_trained_checkpoints_there_and_back(family, tmp_path):
    source = SHARED / "checkpoints" / family
    convert(source, tmp_path / "m.gguf")
    there = verified(source, tmp_path / "m.gguf")
    assert not there.failures
    assert there.vocabulary is True
    assert there.weights.equal + there.weights.rounded == there.weights.weights
    # A_log goes through an exponential, which no bit survives unchanged
    assert there.weights.rounded <= (3 if family == "falcon_mamba" else 0)
    convert(tmp_path / "m.gguf", tmp_path / "back")
    assert verified(tmp_path / "m.gguf", tmp_path / "back").vocabulary is True
    back = verified(source, tmp_path / "back")
    assert back.weights.is_exact
    assert back.logits.kl_divergence < 1e-9
    assert not back.failures


@needs_shared
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_quantized_gguf_verifies_and_runs(run, lmx, kind, tmp_path):
    source = SHARED / "checkpoints" / "olmoe"
    report = run("convert", source, tmp_path / "m.gguf", "--dtype", kind, "--verify", "--json")["verification"]
    assert report["passed"]
    assert report["rounded"] > 100
    assert report["logits"]["top1_agreement"] > (0.95 if kind == "q8_0" else 0.5)
    expected = json.loads((source / "expected.json").read_text())["conversations"][0]
    done = lmx("generate", tmp_path / "m.gguf", "--prompt-ids", ids(expected["prompt_ids"]), "-n", "6", "--json")
    assert done.code == 0, done.err
    assert "of memory as bfloat16" in done.err
    if kind == "q8_0":
        assert json.loads(done.out)["token_ids"] == expected["greedy_ids"][:6]


def ids(values):
    return ",".join(map(str, values))


@needs_shared
def test_a_gguf_chats_shows_and_quantizes(run, tmp_path):
    source = SHARED / "checkpoints" / "dbrx"
    convert(source, tmp_path / "m.gguf", dtype="q8_0")
    facts = run("show", tmp_path / "m.gguf", "--json")
    assert (facts["model_type"], facts["quantization"]) == ("dbrx", "Q8_0 (GGUF)")
    assert facts["size_on_disk"] == (tmp_path / "m.gguf").stat().st_size
    assert facts["chat_template"] == "m.gguf"
    asked = json.loads((source / "expected.json").read_text())["conversations"][0]
    message = tmp_path / "messages.json"
    message.write_text(json.dumps([{"role": "user", "content": "What is the capital of France?"}]))
    answers = [
        run("chat", model, "--messages", message, "-n", "4", "--json") for model in (source, tmp_path / "m.gguf")
    ]
    assert answers[0]["prompt_ids"] == answers[1]["prompt_ids"]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    four = run("generate", tmp_path / "m.gguf", "--4bit", "--prompt-ids", ids(asked["prompt_ids"]), "-n", "3", "--json")
    assert len(four["token_ids"]) == 3
    report = run("quantize", tmp_path / "m.gguf", tmp_path / "nf4", "--4bit", "--json")
    assert report["quantized_parameters"] > 0.8 * report["parameters"]
    assert {item["dtype"] for item in report["kept"]} <= {"BF16", "F32"}
    assert run("generate", tmp_path / "nf4", "Hello", "-n", "2", "--json")["generated_tokens"] <= 2


def test_verify_finds_what_is_wrong(tmp_path):
    source = write_family(tmp_path / "source", "mixtral")
    convert(source, tmp_path / "m.gguf", dtype="q8_0")
    assert not verified(source, tmp_path / "m.gguf").failures
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    place = open_folder(tmp_path / "m.gguf").infos["model.layers.1.block_sparse_moe.experts.2.w2.weight"].offset
    data[place + 2] ^= 0x40  # one code of one block
    (tmp_path / "m.gguf").write_bytes(data)
    report = verified(source, tmp_path / "m.gguf")
    assert report.weights.different == ("model.layers.1.block_sparse_moe.experts.2.w2.weight",)
    assert report.failures
    assert report.to_json()["passed"] is False


def test_verify_of_plain_checkpoints(tmp_path):
    source = write_family(tmp_path / "source", "olmoe", torch.float32)
    convert(source, tmp_path / "bf16", dtype="bf16")
    report = verified(source, tmp_path / "bf16", "bf16")
    assert not report.failures
    assert report.weights.rounded == report.weights.weights
    shutil.copytree(tmp_path / "bf16", tmp_path / "other")
    tensors = load_file(tmp_path / "other/model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, tmp_path / "other/model.safetensors")
    report = verified(tmp_path / "bf16", tmp_path / "other")
    assert report.weights.different == ("model.norm.weight",)


def test_large_models_run_as_they_are_stored_and_let_go_of_each_layer(tmp_path, monkeypatch):
    """After all weights were compared, both sides run each text, and drop a layer's weights when it has run."""
    from lmx import verification
    from lmx.core.checkpoint import Checkpoint
    from lmx.core.mapped import Advice

    let_go = []
    advise = Checkpoint.advise

    def watched(self, name, advice):
        let_go.append((self.folder.name, name)) if advice is Advice.DONT_NEED else None
        advise(self, name, advice)

    monkeypatch.setattr(Checkpoint, "advise", watched)
    monkeypatch.setattr(verification, "_FLOAT32_BYTES", 0)
    source = write_family(tmp_path / "source", "olmoe", torch.bfloat16)
    convert(source, tmp_path / "target", dtype="bf16")
    let_go.clear()
    report = verified(source, tmp_path / "target", "bf16")
    assert not report.failures
    assert report.logits is not None
    assert report.logits.dtype == "bfloat16"
    for side in ("source", "target"):
        of_side = [name for folder, name in let_go if folder == side]
        layers = {name for name in of_side if ".layers." in name}
        assert layers
        assert all(of_side.count(name) >= 2 for name in layers)  # once compared, and again when it has run


def test_a_failed_check_exits_with_3(tmp_path, monkeypatch, capsys):
    from lmx import verification
    from lmx.cli.main import app
    from lmx.cli.run import run as run_command

    source = write_family(tmp_path / "source", "olmoe")
    monkeypatch.setattr(verification, "_failures", lambda *args: ["the logits are far apart"])
    assert run_command(app, ["convert", str(source), str(tmp_path / "m.gguf"), "--verify", "--json"]) == 3
    shown = capsys.readouterr()
    assert json.loads(shown.out)["verification"]["failures"] == ["the logits are far apart"]
    assert "is not the model of" in shown.err


def test_options_that_do_not_go_together(tmp_path):
    source = write_family(tmp_path / "source", "olmoe")
    assert Conversion(tmp_path / "x.gguf").format == "gguf"
    with pytest.raises(UsageError):
        Conversion(tmp_path / "x", dtype="q8_0")
    with pytest.raises(UsageError):
        convert(source, tmp_path / "x", to="gguf")


@pytest.mark.parametrize(("option", "kind"), [((), "bfloat16"), (("--4bit",), "nf4")])
def test_a_gguf_benches_and_says_its_memory_before(lmx, option, kind, tmp_path, monkeypatch):
    quick = partial(ceilings.measure_ceilings, read_bytes=8 << 20, width=256, rounds=2)
    monkeypatch.setattr(ceilings, "measure_ceilings", quick)
    source = write_family(tmp_path / "source", "mixtral")
    convert(source, tmp_path / "m.gguf", dtype="q8_0")
    command = ("bench", str(tmp_path / "m.gguf"), *option, "-p", "8", "-n", "4", "-r", "1", "-o", "json")
    done = lmx(*command)
    assert done.code == 0, done.err
    assert [result["test"] for result in json.loads(done.out)] == ["pp8", "tg4"]
    assert f"its weights take {human_bytes(needed(tmp_path / 'm.gguf', kind))} of memory as {kind}" in done.err
    assert "its weights take" not in lmx(*command, "--quiet").err


def needed(path, kind):
    return made_bytes(open_folder(path), quantize=kind if kind == "nf4" else None)


def test_the_library_converts(tmp_path):
    source = write_family(tmp_path / "source", "olmoe")
    done = library.convert(source, tmp_path / "m.gguf")
    assert done.output_bytes == (tmp_path / "m.gguf").stat().st_size
    assert library.convert(tmp_path / "m.gguf", tmp_path / "back").output == tmp_path / "back"
    assert verified(tmp_path / "m.gguf", tmp_path / "back").weights.is_exact
    with pytest.raises(ConflictError):
        library.convert(source, tmp_path / "m.gguf")


def test_memory_is_that_of_what_is_made(tmp_path):
    source = write_family(tmp_path / "source", "olmoe")
    convert(source, tmp_path / "plain.gguf")
    convert(source, tmp_path / "blocks.gguf", dtype="q8_0")
    plain, blocks = open_folder(tmp_path / "plain.gguf"), open_folder(tmp_path / "blocks.gguf")
    matrices = sum(info.nbytes for info in plain.infos.values() if info.dtype == "BF16")
    assert made_bytes(plain) == plain.parameters * 2 - matrices
    assert made_bytes(blocks) == blocks.parameters * 2
    assert made_bytes(blocks, quantize="nf4") < made_bytes(blocks) * 0.6
    assert made_bytes(open_folder(source)) == 0


def test_a_source_is_never_replaced_by_its_own_conversion(lmx, tmp_path):
    folder, gguf = write_family(tmp_path / "in" / "model", "olmoe"), tmp_path / "m.gguf"
    convert(folder, gguf)
    before = {path: path.read_bytes() for path in (gguf, *folder.iterdir())}
    for source, target in ((folder, folder), (folder, folder.parent), (gguf, gguf)):
        done = lmx("convert", source, target, "--force")
        assert (done.code, "holds the source itself" in done.err) == (2, True)
    assert {path: path.read_bytes() for path in (gguf, *folder.iterdir())} == before


def test_a_folder_may_not_have_the_name_of_a_file(lmx, tmp_path):
    source = write_family(tmp_path / "model", "olmoe")
    done = lmx("convert", source, tmp_path / "m.gguf", "--to", "hf")
    assert (done.code, "is the name of a GGUF" in done.err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
