import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_checkpoint import write_checkpoint

import lmx
from lmx.api import demo_path, model_name, open_checkpoint
from lmx.core.answer import Finished, PromptProcessed, Token
from lmx.core.errors import InputError, NotFoundError, UsageError
from lmx.language_model import LanguageModel
from lmx.quant.modules import QuantLinear


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[LanguageModel]:
    with lmx.load(folder, device="cpu", dtype="float32") as model:
        yield model


def test_a_loaded_model_is_that_of_transformers(model: LanguageModel, folder: Path) -> None:
    from transformers import MixtralForCausalLM

    reference = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([model.tokenizer.encode("The quick brown fox")])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)
    assert not model.training
    assert {name for name, _ in model.named_parameters() if "head" in name} == {"head.weight"}


def test_generate_yields_typed_events(model: LanguageModel) -> None:
    first, *tokens, last = model.generate("Hello", max_new_tokens=4)
    assert isinstance(first, PromptProcessed)
    assert [type(token) for token in tokens] == [Token] * 4
    assert isinstance(last, Finished)
    again = list(model.generate(model.tokenizer.encode("Hello"), max_new_tokens=4))[-1]
    assert isinstance(again, Finished)
    assert again.token_ids == last.token_ids


def test_stop_ids_are_the_union_of_every_source(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": [7, 8]}))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 9, "do_sample": True, "top_k": 5}))
    with lmx.api.OpenedModel.open(copy) as opened:
        model = opened.load()
        assert model.stop_ids == {7, 8, 9, 2}, "2 is what the template writes after an answer"
        assert (model.sampling.temperature, model.sampling.top_k) == (1.0, 5)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(InputError, match=r"generation_config.json: eos_token_id"):
        lmx.load(copy)


def test_another_architecture_is_refused_by_its_config_alone(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(InputError, match="'llama' is not supported"):
        open_checkpoint(copy)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_dtypes(folder: Path, dtype: str | torch.dtype) -> None:
    model = lmx.load(folder, dtype=dtype)
    model.close()
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_weights_of_several_dtypes_become_that_of_most(folder: Path, tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM

    reference = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).bfloat16()
    reference.model.norm.float()
    reference.save_pretrained(tmp_path)
    for file in folder.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = lmx.load(tmp_path)
    model.close()
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_weights_stay_views_of_the_file(folder: Path) -> None:
    model = lmx.load(folder)
    model.close()
    assert model.decoder.embed.weight.dtype == torch.float32
    assert not model.decoder.embed.weight.untyped_storage().resizable()


@pytest.mark.parametrize("head", ["none", "sequence", "token"])
def test_other_heads_generate_no_text(folder: Path, head: str) -> None:
    model = lmx.load(folder, head=head)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=head):
        model.generate("Hello")
    with pytest.raises(UsageError, match=head):
        model.chat()
    model.close()


@pytest.mark.parametrize("scheme", ["nf4", "int8", "qint8", "qint4"])
def test_a_plain_model_is_quantized_while_it_is_loaded(folder: Path, scheme: str) -> None:
    with lmx.load(folder, quantize=scheme) as model:
        linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
        assert linears
        assert f"scheme={scheme}" in repr(linears[0])


def test_what_cannot_be_honoured(folder: Path) -> None:
    with pytest.raises(UsageError, match="quantize='q4'"):
        lmx.load(folder, quantize="q4")
    with pytest.raises(UsageError, match="float7"):
        lmx.load(folder, dtype="float7")
    with pytest.raises(UsageError, match="tpu"):
        lmx.load(folder, device="tpu")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="cuda"):
            lmx.load(folder, device="cuda")


def test_the_demo_is_there_or_said_to_be_absent() -> None:
    bundled = Path(lmx.__file__).parent / "demo" / "config.json"
    if bundled.exists():
        assert demo_path() == bundled.parent
    else:
        with pytest.raises(NotFoundError, match="demo"):
            demo_path()


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert model_name(None) == "demo"
    assert model_name("org/name", "v1") == "org/name@v1"
    assert model_name("./a") == "./a"
    assert model_name(tmp_path) == str(tmp_path)
