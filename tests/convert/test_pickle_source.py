"""Pickled checkpoints, as torch.save and transformers make them, against their safetensors twins."""

import json
import shutil
import zipfile
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoint import write_checkpoint
from torch import Tensor, nn

from lmx.api import load, open_folder
from lmx.convert import pickle_child
from lmx.convert.pickle_source import INDEX_BIN, SINGLE_BIN, PickleCheckpoint, holds_pickles_only
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError, NotFoundError
from lmx.core.mapped import Advice
from lmx.quantization import quantize

NAMES = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", "chat_template.jinja")


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.tensor(name).clone() for name in checkpoint.infos}


def pickled(twin: Path, folder: Path, shards: int) -> Path:
    """The same model, saved with torch.save: one file, or shards and an index as transformers 4 named them."""
    folder.mkdir()
    for name in NAMES:
        if (twin / name).exists():
            shutil.copy(twin / name, folder / name)
    tensors = weights(twin)
    if shards == 1:
        torch.save(OrderedDict(tensors), folder / SINGLE_BIN)
        return folder
    weight_map = {name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        torch.save({name: t for name, t in tensors.items() if weight_map[name] == shard}, folder / shard)
    (folder / INDEX_BIN).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("twin") / "model")


@pytest.fixture(scope="module", params=[1, 3], ids=["single", "sharded"])
def folder(request: pytest.FixtureRequest, twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pickled(twin, tmp_path_factory.mktemp("pickled") / "model", request.param)


def test_every_tensor_is_the_twins(folder: Path, twin: Path) -> None:
    expected, found = weights(twin), open_folder(folder)
    assert isinstance(found, PickleCheckpoint)
    assert found.infos.keys() == expected.keys()
    for name, tensor in expected.items():
        info = found.infos[name]
        assert torch.equal(found.tensor(name), tensor)
        assert found.tensor(name).dtype == tensor.dtype
        assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.nbytes)
        assert info.file.read_bytes()[info.offset :][: info.nbytes] == tensor.view(torch.uint8).numpy().tobytes()
    places = [(info.file, info.offset) for info in found.infos.values()]
    assert places == sorted(places)
    assert found.parameters == sum(tensor.numel() for tensor in expected.values())


def test_the_models_logits_are_the_twins(folder: Path, twin: Path) -> None:
    ids = torch.tensor([[1, 5, 9, 200, 3, 44]])
    with load(folder) as model, load(twin) as reference, torch.inference_mode():
        # The weights are equal bit by bit; products of tensors that are aligned differently may round differently
        torch.testing.assert_close(model(input_ids=ids).logits, reference(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_quantizing_it_gives_the_twins_bytes(folder: Path, twin: Path, tmp_path: Path) -> None:
    ours = quantize(folder, tmp_path / "ours", max_shard_bytes=40_000)
    reference = quantize(twin, tmp_path / "theirs", max_shard_bytes=40_000)
    assert ours.output_bytes == reference.output_bytes
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert names == {path.name for path in (tmp_path / "ours").iterdir()}
    assert any(name.startswith("model-00002") for name in names)
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def table() -> dict[str, Tensor]:
    base = torch.arange(60.0).reshape(6, 10)
    return {
        "empty first": torch.empty(0, 3),
        "dense": base,
        "part": base[2:4],
        "transposed": base.t(),
        "every second": base[:, ::2],
        "no gap, other order": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty between": torch.empty(2, 0, dtype=torch.float16),
        "narrow": torch.arange(5, dtype=torch.int8),
        "bfloat16": torch.randn(3, 1, 7).bfloat16(),
        "bool": torch.tensor([True, False]),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "alone": torch.randn(3),
    }


def same(found: PickleCheckpoint, expected: dict[str, Tensor]) -> None:
    assert found.infos.keys() == expected.keys()
    for name, tensor in expected.items():
        ours = found.tensor(name)
        found.advise(name, Advice.WILL_NEED)
        assert ours.is_contiguous()
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours.view(torch.uint8) if ours.dim() else ours, dense(tensor)), name


def dense(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8) if tensor.dim() else tensor


def test_views_of_every_kind_are_what_torch_loads(tmp_path: Path) -> None:
    torch.save(table(), tmp_path / "any-name.pt")
    expected = torch.load(tmp_path / "any-name.pt", weights_only=True)
    found = PickleCheckpoint.open(tmp_path)
    same(found, expected)
    dense_info, part = found.infos["dense"], found.infos["part"]
    assert part.offset == dense_info.offset + 2 * 10 * 4  # the same bytes, not a copy


def test_an_archive_of_an_older_torch_or_packed_by_hand(tmp_path: Path) -> None:
    """Before 2.1 there was no `.format_version`, and nothing says that storages are aligned."""
    torch.save(table(), tmp_path / "new")
    with zipfile.ZipFile(tmp_path / "new") as new, zipfile.ZipFile(tmp_path / "old.bin", "w") as old:
        for name in new.namelist():
            if name.rpartition("/")[2] not in (".format_version", ".storage_alignment", "byteorder"):
                old.writestr(name, new.read(name))
    (tmp_path / "new").unlink()
    same(PickleCheckpoint.open(tmp_path), torch.load(tmp_path / "old.bin", weights_only=True))


def test_an_archive_past_four_gigabytes(tmp_path: Path) -> None:
    with torch.serialization.skip_data():  # leaves a hole in a sparse file
        large = torch.empty(2_300_000_000, dtype=torch.bfloat16)
        torch.save({"large": large, "after": torch.ones(3), "last": torch.ones(5)}, tmp_path / SINGLE_BIN)
    found = PickleCheckpoint.open(tmp_path)
    last = found.infos["last"]
    with (tmp_path / SINGLE_BIN).open("r+b") as file:
        file.seek(last.offset)
        file.write(torch.arange(5.0).numpy().tobytes())
    assert found.tensor("last").tolist() == [0, 1, 2, 3, 4]
    assert found.infos["large"].nbytes == 4_600_000_000
    assert torch.load(tmp_path / SINGLE_BIN, mmap=True)["last"].tolist() == [0, 1, 2, 3, 4]


def test_both_ways_to_learn_the_offsets_agree(tmp_path: Path) -> None:
    """Of newer torch by meta storages, of older by fake tensors: the child takes the first that there is."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.save(table(), tmp_path / "x.pt")
    rows = []
    for loader in (pickle_child.Loader(nullcontext(), "meta"), pickle_child.Loader(FakeTensorMode(), None)):
        with (tmp_path / "x.pt").open("rb") as file:
            rows.append([pickle_child._row(*item) for item in pickle_child._tensors(loader(file))])
    assert rows[0] == rows[1]
    assert len(rows[0]) == len(table())


def test_a_modules_own_state_dict(tmp_path: Path) -> None:
    """It is an OrderedDict with attributes, its values detached parameters and buffers."""
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / SINGLE_BIN)
    same(PickleCheckpoint.open(tmp_path), module.state_dict())


@pytest.mark.parametrize("name", ["state_dict", "model"])
def test_a_state_dict_within_a_training_checkpoint(tmp_path: Path, name: str) -> None:
    torch.save({name: {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "x.pt")
    assert list(PickleCheckpoint.open(tmp_path).infos) == ["a"]


def tied_folder(folder: Path, tied: bool) -> Path:
    folder.mkdir()
    embedding = torch.randn(8, 4)
    torch.save({"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}, folder / SINGLE_BIN)
    from transformers import MixtralConfig

    config = MixtralConfig(vocab_size=8, hidden_size=4, num_attention_heads=1, num_key_value_heads=1)
    config.tie_word_embeddings = tied
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_left_out_as_in_safetensors(tmp_path: Path, tied: bool) -> None:
    infos = PickleCheckpoint.open(tied_folder(tmp_path / "m", tied)).infos
    assert ("lm_head.weight" in infos) == (not tied)
    assert "model.embed_tokens.weight" in infos


def test_safetensors_win_over_a_pickled_twin(twin: Path, tmp_path: Path) -> None:
    folder = pickled(twin, tmp_path / "both", 1)
    assert holds_pickles_only(folder)
    assert not holds_pickles_only(tmp_path / "absent")
    save_file(weights(twin), folder / "model.safetensors")
    assert not holds_pickles_only(folder)
    assert not isinstance(open_folder(folder), PickleCheckpoint)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    assert holds_pickles_only(folder)  # that one is Mistral's own format
    (folder / "consolidated.safetensors").rename(folder / "model.safetensors")
    assert load_file(folder / "model.safetensors").keys() == open_folder(folder).infos.keys()


def test_files_of_a_training_run_are_no_weights(tmp_path: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
    assert not holds_pickles_only(tmp_path)
    torch.save({"b": torch.ones(1)}, tmp_path / "weights.pt")
    assert list(PickleCheckpoint.open(tmp_path).infos) == ["b"]
    torch.save({"c": torch.ones(1)}, tmp_path / "more.pt")
    with pytest.raises(InputError, match="2 files of pickled weights"):
        PickleCheckpoint.open(tmp_path)


def test_what_is_missing_or_old_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_folder(tmp_path / "absent")
    (tmp_path / INDEX_BIN).write_text(json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}))
    with pytest.raises(InputError, match="pytorch_model-00001-of-00001"):
        open_folder(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / SINGLE_BIN, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"torch before 1\.6"):
        open_folder(tmp_path)


def test_an_unknown_tensor(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / SINGLE_BIN)
    with pytest.raises(InputError, match="no tensor 'b'"):
        PickleCheckpoint.open(tmp_path).tensor("b")
