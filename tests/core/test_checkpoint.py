"""Opening checkpoint folders: every layout against the safetensors package and huggingface_hub's own sharding."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from support import SHARED, needs_shared

from lmx.core.checkpoint import Checkpoint, Source
from lmx.core.errors import InputError, NotFoundError
from lmx.core.mapped import Advice
from lmx.core.safetensors_file import open_safetensors

INDEX = "model.safetensors.index.json"


def state_dict(tensors: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {f"layers.{i}.weight": torch.randn(i + 1, 64, generator=generator).bfloat16() for i in range(tensors)}


def same(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> bool:
    return checkpoint.infos.keys() == expected.keys() and all(
        torch.equal(checkpoint.tensor(name), tensor) and checkpoint.tensor(name).dtype == tensor.dtype
        for name, tensor in expected.items()
    )


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """A folder as huggingface_hub shards it."""
    tensors = state_dict()
    save_torch_state_dict(tensors, folder, max_shard_size=3000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    return tensors


def edit_index(folder: Path, **changes: object) -> None:
    """Set entries of the weight map; None drops one."""
    index = json.loads((folder / INDEX).read_text())
    for name, shard in changes.items():
        index["weight_map"][name] = shard
        if shard is None:
            del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(folder)
    assert "\n" not in caught.value.message
    return caught.value


@needs_shared
@pytest.mark.parametrize("family", ["dbrx", "falcon_mamba", "mixtral", "olmoe", "recurrent_gemma"])
def test_trained_checkpoints_read_as_the_package_reads_them(family: str) -> None:
    folder = SHARED / "checkpoints" / family
    checkpoint = Checkpoint.open(folder)
    expected = load_file(folder / "model.safetensors")
    assert same(checkpoint, expected)
    assert checkpoint.parameters == sum(t.numel() for t in expected.values())
    assert checkpoint.total_bytes == sum(t.nbytes for t in expected.values())
    assert checkpoint.config == json.loads((folder / "config.json").read_text())
    assert checkpoint.generation_config == json.loads((folder / "generation_config.json").read_text())
    assert checkpoint.quantization_config is None
    assert open_safetensors(checkpoint.files[0]).metadata == {"format": "pt"}


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert same(checkpoint, tensors)
    assert [path.name for path in checkpoint.files] == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    places = [(info.file.name, info.offset) for info in checkpoint.infos.values()]
    assert places == sorted(places)


def test_the_single_file_wins_over_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"only": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(Checkpoint.open(tmp_path).infos) == ["only"]


def test_one_other_file_is_taken_but_never_a_consolidated_one(tmp_path: Path) -> None:
    save_file({"theirs": torch.ones(2)}, tmp_path / "consolidated.00.safetensors")
    error = refused(tmp_path)
    assert "consolidated.00.safetensors" in error.message
    assert "lmx convert" in error.hint
    save_file({"ours": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert list(Checkpoint.open(tmp_path).infos) == ["ours"]
    save_file({"more": torch.ones(2)}, tmp_path / "weights2.safetensors")
    assert "2 safetensors files, but no model.safetensors.index.json" in refused(tmp_path).message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.Q4_0.gguf"])
def test_other_formats_are_named_with_the_way_to_convert_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    error = refused(tmp_path)
    assert name in error.message
    assert "lmx convert" in error.hint


def test_an_empty_folder_is_bad_input_and_a_missing_one_is_not_found(tmp_path: Path) -> None:
    assert "holds no weights" in refused(tmp_path).message
    with pytest.raises(NotFoundError, match="does not exist"):
        Checkpoint.open(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "not a checkpoint folder" in refused(tmp_path / "file").message


def test_configs_are_read_when_asked_for(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(InputError, match=r"no config\.json"):
        _ = checkpoint.config
    assert checkpoint.generation_config is None
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    assert checkpoint.quantization_config == {"quant_method": "bitsandbytes"}
    (tmp_path / "config.json").write_text('{"quantization_config": [4]}')
    with pytest.raises(InputError, match="quantization_config"):
        _ = Checkpoint.open(tmp_path).quantization_config
    (tmp_path / "generation_config.json").symlink_to("gone")
    with pytest.raises(NotFoundError, match="link to a file that does not exist"):
        _ = Checkpoint.open(tmp_path).generation_config


def test_optimum_quantos_tensors_say_that_they_are_quantized(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name, is_quantized in [("a.weight", False), ("a.weight._data", True), ("a.weight._data._data", True)]:
        save_file({name: torch.ones(2)}, tmp_path / "model.safetensors")
        assert Checkpoint.open(tmp_path).is_quantized == is_quantized


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"has no tensor 'lm_head\.weight'"):
        Checkpoint.open(tmp_path).tensor("lm_head.weight")


def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    real, snapshot, blobs = tmp_path / "real", tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    for folder in (real, snapshot, blobs):
        folder.mkdir(parents=True)
    tensors = sharded(real)
    for number, path in enumerate(sorted(real.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    checkpoint = Checkpoint.open(snapshot)
    assert same(checkpoint, tensors)
    assert checkpoint.config == {"model_type": "mixtral"}
    checkpoint.files[1].resolve().unlink()
    assert "shard" in refused(snapshot).message


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    error = refused(tmp_path)
    assert victim.name in error.message
    assert "download" in error.hint


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    victim = sorted(tmp_path.glob("*.safetensors"))[-1]
    victim.write_bytes(victim.read_bytes()[:-1])
    error = refused(tmp_path)
    assert victim.name in error.message
    assert "truncated" in error.message
    assert "download" in error.hint


def test_index_and_headers_must_agree(tmp_path: Path) -> None:
    sharded(tmp_path)
    first, *_, last = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    edit_index(tmp_path, **{"lm_head.weight": last})
    assert f"tensor 'lm_head.weight' is not in '{last}'" in refused(tmp_path).message
    edit_index(tmp_path, **{"lm_head.weight": None, "layers.0.weight": last, "layers.1.weight": last})
    message = refused(tmp_path).message
    assert "tensor 'layers.0.weight' and 1 more are not in" in message
    edit_index(tmp_path, **{"layers.0.weight": None, "layers.1.weight": first})
    assert "tensor 'layers.0.weight' is in" in refused(tmp_path).message


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "2.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    assert "tensor 'a' lies in both '1.safetensors' and '2.safetensors'" in refused(tmp_path).message


def test_a_checkpoint_is_a_source(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    source: Source = Checkpoint.open(tmp_path)
    assert source.label == str(tmp_path)
    for name in source.infos:
        source.advise(name, Advice.WILL_NEED)
        assert torch.equal(source.tensor(name), tensors[name])
        source.advise(name, Advice.DONT_NEED)


def many_tensors(folder: Path, count: int) -> None:
    header = {
        f"model.layers.{i // 192}.mlp.experts.{i % 192}.down_proj.weight": {
            "dtype": "BF16",
            "shape": [8, 4],
            "data_offsets": [64 * i, 64 * i + 64],
        }
        for i in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64 * count))


def test_opening_as_many_tensors_as_olmoe_has_takes_milliseconds_and_no_torch(tmp_path: Path) -> None:
    many_tensors(tmp_path, 3219)
    code = (
        "import sys, time; from pathlib import Path; from lmx.core.checkpoint import Checkpoint\n"
        "def once():\n"
        f"    start = time.process_time(); Checkpoint.open(Path({str(tmp_path)!r}))\n"
        "    return time.process_time() - start\n"
        "print(min(once() for _ in range(5)), 'torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(output[0]) < 0.05
    assert output[1] == "False"


def test_a_view_costs_microseconds(tmp_path: Path) -> None:
    many_tensors(tmp_path, 3219)
    checkpoint = Checkpoint.open(tmp_path)

    def once() -> float:
        start = time.process_time()
        for name in checkpoint.infos:
            checkpoint.tensor(name)
        return (time.process_time() - start) / len(checkpoint.infos)

    assert min(once() for _ in range(5)) < 50e-6
