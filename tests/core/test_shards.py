"""Shards are read back by the safetensors library; their layout is checked number by number."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lmx.core.safetensors_file import open_safetensors
from lmx.core.shards import ShardWriter, Slot, index_json, plan_shards

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8, "I8": torch.int8}


def slots(*sizes, dtype="U8", prefix="t"):
    """A unit of tensors of so many elements."""
    return tuple(Slot(f"{prefix}{place}", dtype, (size,)) for place, size in enumerate(sizes))


def fill(slot):
    generator = torch.Generator().manual_seed(len(slot.name) * 1000 + slot.nbytes)
    return torch.randint(0, 100, slot.shape, generator=generator).to(DTYPES[slot.dtype])


def write(folder, shard):
    with ShardWriter(folder / shard.name, shard) as writer:
        for slot in reversed(shard.slots):  # any order will do
            writer.write(slot.name, fill(slot))


def test_the_library_reads_what_was_written(tmp_path):
    unit = (Slot("a", "F32", (3, 5)), Slot("b", "BF16", (64,)), Slot("c", "U8", ()), Slot("d", "BF16", (7,)))
    (shard,) = plan_shards([[unit]])
    write(tmp_path, shard)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == {"a", "b", "c", "d"}
    for slot in unit:
        assert found[slot.name].dtype == DTYPES[slot.dtype]
        assert torch.equal(found[slot.name], fill(slot))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (tmp_path / "model.safetensors").stat().st_size == shard.size


def test_every_tensor_that_can_starts_at_64_bytes_and_the_others_at_their_elements(tmp_path):
    units = [
        (Slot("odd", "U8", (3,)), Slot("w", "U8", (128,))),
        (Slot("half", "BF16", (5,)), Slot("x", "F32", (16,)), Slot("single", "F32", (3,)), Slot("y", "BF16", (32,))),
    ]
    (shard,) = plan_shards([units])
    write(tmp_path, shard)
    infos = open_safetensors(tmp_path / shard.name).tensors  # refuses holes and overlaps
    assert [name for name, info in infos.items() if info.offset % 64 == 0][:3] == ["w", "x", "y"]
    assert list(infos) == ["w", "x", "y", "single", "half", "odd"]
    assert infos["single"].offset % 4 == 0
    assert infos["half"].offset % 2 == 0


def test_groups_stay_together_where_they_fit():
    groups = [[slots(60, prefix="a")], [slots(30, prefix="b0"), slots(30, prefix="b1")], [slots(50, prefix="c")]]
    shards = plan_shards(groups, 100)
    assert [shard.name for shard in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert [sorted(slot.name for slot in shard.slots) for shard in shards] == [["a0"], ["b00", "b10"], ["c0"]]


def test_a_group_larger_than_a_file_is_dealt_out_unit_by_unit_and_a_unit_never():
    group = [slots(40, prefix="a"), slots(40, prefix="b"), slots(90, 90, prefix="c"), slots(40, prefix="d")]
    shards = plan_shards([group], 100)
    assert [[slot.name for slot in shard.slots] for shard in shards] == [["a0", "b0"], ["c0", "c1"], ["d0"]]


def test_the_index_names_every_tensor_once():
    shards = plan_shards([[slots(60, 10, prefix="a")], [slots(60, dtype="F32", prefix="b")]], 100)
    index = json.loads(index_json(shards))
    assert index["metadata"] == {"total_size": 310}
    assert index["weight_map"] == {
        "a0": "model-00001-of-00002.safetensors",
        "a1": "model-00001-of-00002.safetensors",
        "b0": "model-00002-of-00002.safetensors",
    }


def test_a_tensor_can_be_written_in_parts(tmp_path):
    (shard,) = plan_shards([[(Slot("a", "BF16", (100, 4)),)]])
    values = torch.arange(400).bfloat16().view(100, 4)
    with ShardWriter(tmp_path / shard.name, shard) as writer:
        for start in (60, 0, 30):
            rows = values[start : {60: 100, 0: 30, 30: 60}[start]]
            writer.write("a", rows, start * 8)
    assert torch.equal(load_file(tmp_path / shard.name)["a"], values)


def test_a_forgotten_or_too_long_tensor_is_an_error(tmp_path):
    (shard,) = plan_shards([[slots(10, 10)]])
    with pytest.raises(ValueError, match="bytes were written of"), ShardWriter(tmp_path / "x", shard) as writer:
        writer.write("t0", torch.zeros(10, dtype=torch.uint8))
    with pytest.raises(ValueError, match="a place of 10"), ShardWriter(tmp_path / "x", shard) as writer:
        writer.write("t0", torch.zeros(11, dtype=torch.uint8))
