"""The safetensors reader against the safetensors package: what it writes is read, what it refuses is refused."""

import gc
import json
import mmap
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from lmx.core.errors import InputError, ResourceError
from lmx.core.mapped import Advice
from lmx.core.safetensors_file import SafetensorsFile, TensorInfo, open_safetensors

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with this header (an object, or its bytes as they are) and this data section."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def view(file: SafetensorsFile, name: str) -> torch.Tensor:
    info = file.tensors[name]
    return file.data.view(info.dtype, info.shape, info.offset, info.nbytes)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    if dtype is torch.bool:
        return bits[..., 0] > 127
    return bits.to(torch.uint8).view(dtype).view(shape)


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_reads_what_the_package_writes(tmp_path: Path, name: str) -> None:
    dtype = TORCH_DTYPES[name]
    shapes = {"scalar": (), "one": (1,), "vector": (7,), "matrix": (3, 5), "none": (0,), "flat": (4, 0, 2)}
    tensors = {key: random_tensor(dtype, shape, seed) for seed, (key, shape) in enumerate(shapes.items())}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "note": "ä"})
    file = open_safetensors(path)
    assert file.metadata == {"format": "pt", "note": "ä"}
    assert file.tensors.keys() == tensors.keys()
    for key, tensor in tensors.items():
        info = file.tensors[key]
        assert (info.name, info.dtype, info.shape, info.file) == (key, name, tuple(tensor.shape), path)
        assert (info.parameters, info.nbytes) == (tensor.numel(), tensor.numel() * dtype.itemsize)
        assert path.read_bytes()[info.offset : info.offset + info.nbytes] == raw(tensor)
        assert view(file, key).dtype == dtype
        assert view(file, key).shape == tensor.shape
        assert raw(view(file, key)) == raw(tensor)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {
        "late": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
        "early": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
    }
    assert list(open_safetensors(write(tmp_path / "x", header, b"abcde")).tensors) == ["early", "late"]


def test_aligned_tensors_are_views_and_unaligned_ones_copies(tmp_path: Path) -> None:
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "odd": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "even": {"dtype": "F32", "shape": [2], "data_offsets": [9, 17]},
    }
    values = torch.tensor([1.5, -2.25])
    for shift in range(4):  # one of the four shifts aligns `even`, another one `odd`
        text = json.dumps(header).encode() + b" " * shift
        file = open_safetensors(write(tmp_path / f"{shift}", text, b"\7" + raw(values) + raw(values)))
        for name in ("odd", "even"):
            first, second = view(file, name), view(file, name)
            aligned = file.tensors[name].offset % 4 == 0
            assert torch.equal(first, values)
            assert first.data_ptr() % 4 == 0
            assert (first.data_ptr() == second.data_ptr()) == aligned


def test_a_write_never_reaches_the_file_and_is_seen_by_other_views(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": torch.ones(5000)}, path)
    before = path.read_bytes()
    file = open_safetensors(path)
    weight = view(file, "w").requires_grad_()
    weight.sum().backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD([weight], lr=0.5).step()
    assert torch.equal(view(file, "w"), torch.full((5000,), 0.5))
    assert path.read_bytes() == before
    assert torch.equal(view(open_safetensors(path), "w"), torch.ones(5000))


def test_a_view_outlives_its_file_object_and_the_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensor = torch.arange(100_000, dtype=torch.int64)
    safetensors.torch.save_file({"w": tensor}, path)
    kept = view(open_safetensors(path), "w")
    path.unlink()
    gc.collect()
    assert torch.equal(kept, tensor)


def test_views_of_one_file_have_storages_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(10), "b": torch.zeros(20)}, path)
    file = open_safetensors(path)
    assert view(file, "a").untyped_storage().nbytes() == 40
    assert view(file, "b").untyped_storage().nbytes() == 80


def test_a_file_larger_than_memory_is_mapped_without_reserving_any(tmp_path: Path) -> None:
    terabyte = 1 << 40
    path = write(tmp_path / "x", {"w": {"dtype": "U8", "shape": [terabyte], "data_offsets": [0, terabyte]}})
    start = path.stat().st_size
    try:
        with path.open("r+b") as stream:
            stream.truncate(start + terabyte)
            stream.seek(start + terabyte - 1)
            stream.write(b"\x2a")
    except OSError as error:
        pytest.skip(f"this file system has no sparse files of that size: {error}")
    tensor = view(open_safetensors(path), "w")
    assert tensor.shape == (terabyte,)
    assert (int(tensor[0]), int(tensor[-1])) == (0, 42)


def test_advice_changes_no_value_and_dont_need_spares_the_neighbours_writes(tmp_path: Path) -> None:
    page = mmap.PAGESIZE
    sizes = {"a": page + 100, "b": 3 * page, "c": page}
    header, start = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [start, start + size]}
        start += size
    file = open_safetensors(write(tmp_path / "x", header, b"\1" * start))
    for name in sizes:
        view(file, name).fill_(2)
    for advice in (Advice.WILL_NEED, Advice.SEQUENTIAL):
        for info in file.tensors.values():
            file.data.advise(advice, info.offset, info.nbytes)
    assert all(bool((view(file, name) == 2).all()) for name in sizes)
    info = file.tensors["b"]
    file.data.advise(Advice.DONT_NEED, info.offset, info.nbytes)
    assert bool((view(file, "a") == 2).all())
    assert bool((view(file, "c") == 2).all())
    assert torch.equal(view(file, "b"), view(file, "b"))
    if sys.platform == "linux":
        assert int((view(file, "b") == 1).sum()) == 2 * page  # the whole pages, as the file has them


def test_opening_imports_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": torch.ones(3)}, path)
    code = (
        "import sys; from pathlib import Path; from lmx.core.safetensors_file import open_safetensors; "
        f"print(list(open_safetensors(Path({str(path)!r})).tensors), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "['w'] False\n"


def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n")
    with pytest.raises(InputError, match="Git LFS pointer"):
        open_safetensors(path)


@pytest.mark.skipif(sys.platform != "linux", reason="an address space limit is enforced on Linux only")
def test_a_refused_map_is_a_resource_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"w": {"dtype": "U8", "shape": [1 << 34], "data_offsets": [0, 1 << 34]}})
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + (1 << 34))
    code = (
        "import resource, sys; from pathlib import Path; from lmx.core.safetensors_file import open_safetensors; "
        "from lmx.core.errors import ResourceError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))\n"
        f"try: open_safetensors(Path({str(path)!r}))\n"
        "except ResourceError as error: print(error.hint)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ulimit -v" in result.stdout
    assert ResourceError.exit_code == 6


# --- the same verdict as the package, over thousands of damaged files ---

# Where we refuse what the package (0.8) accepts: a part of our message, and why.
STRICTER = {
    "stands twice in one object": "the format disallows duplicate keys; the package takes the last one",
    "does not begin with '{'": "the format demands it; the package skips white space",
    "has the unknown dtype": "complex and 4 to 6 bit types, which no family here stores",
    "is not described by exactly": "the package skips unknown fields, which could change what the bytes mean, and "
    "takes a bare list [dtype, shape, offsets], which the format does not have",
    "has an impossible shape": "empty tensors whose other dimensions overflow the 64 bits that torch counts strides in",
}
# Where we accept what the package refuses: a pattern of the file, and why.
LAXER = {
    r"[\[ ,]-0[ ,\]]": "-0 is an integer in JSON and 0 to Python; the package's parser makes a float of it",
}


def package_reads(data: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {name: (entry["dtype"], list(entry["shape"]), bytes(entry["data"])) for name, entry in entries}


def we_read(path: Path) -> tuple[dict[str, tuple[str, list[int], bytes]] | None, str]:
    data = path.read_bytes()
    try:
        tensors = open_safetensors(path).tensors
    except InputError as error:
        return None, error.message
    return {name: (i.dtype, list(i.shape), data[i.offset : i.offset + i.nbytes]) for name, i in tensors.items()}, ""


def base_header(rng: random.Random) -> tuple[dict[str, object], int]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}} if rng.random() < 0.5 else {}
    start = 0
    for i in range(rng.randint(1, 4)):
        dtype = rng.choice(["F32", "BF16", "U8", "I64", "BOOL"])
        shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 3))]
        size = TORCH_DTYPES[dtype].itemsize
        for n in shape:
            size *= n
        header[f"t{i}.weight"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    return header, start


NUMBERS = [-1, 0, 1, 2, 3, 4, 7, 8, 16, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 1.0, 0.5, True, None, "1"]
DTYPES = ["F32", "F64", "BF16", "F8_E4M3", "U16", "f32", "F4", "C64", "Q4_0", "", 3, None, ["F32"]]
FIELDS = ["dtype", "shape", "data_offsets"]
JUNK: list[object] = [
    None,
    True,
    0,
    -1,
    1.5,
    "",
    "x",
    [],
    {},
    [[]],
    {"a": 1},
    {"dtype": "U8"},
    ["U8", [0], [0, 0]],
    {"a": "b"},
]


def mutate_object(header: dict[str, object], rng: random.Random) -> None:
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    assert isinstance(entry, dict)
    match rng.randrange(9):
        case 0:
            entry["dtype"] = rng.choice(DTYPES)
        case 1:
            entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randint(0, 4))]
        case 2:
            entry["data_offsets"] = [rng.choice(NUMBERS) for _ in range(rng.choice([2, 2, 2, 1, 3]))]
        case 3:
            entry["data_offsets"][rng.randrange(2)] += rng.choice([-8, -1, 1, 4])
        case 4:
            del entry[rng.choice(FIELDS)]
        case 5:
            entry[rng.choice([*FIELDS, "extra"])] = rng.choice(JUNK)
        case 6:
            header[name] = rng.choice(JUNK)
        case 7:
            header["__metadata__"] = rng.choice(JUNK)
        case 8:
            header[rng.choice([name + "x", "", "\x00", "é"])] = dict(entry)


def mutate_bytes(text: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(text))
    match rng.randrange(6):
        case 0:
            return text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
        case 1:
            return text[:at] + text[at + 1 :]
        case 2:
            return text[:at] + bytes([rng.choice(b'{}[]",:0-9.eE \\\n\t\x00')]) + text[at:]
        case 3:
            return text + rng.choice([b" ", b"\n", b"\x00", b"}", b"{}", b"  x"])
        case 4:
            return rng.choice([b" ", b"\n", b"\xef\xbb\xbf", b"["]) + text
        case _:
            return text[:-1] + b"," + text[1:]  # every key twice


def damaged_file(rng: random.Random) -> bytes:
    header, size = base_header(rng)
    if rng.random() < 0.6:
        mutate_object(header, rng)
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5).encode()
    if rng.random() < 0.4:
        text = mutate_bytes(text, rng)
    length = len(text) + (rng.choice([-8, -1, 1, 8, 2**40, 2**63]) if rng.random() < 0.05 else 0)
    size = max(size + (rng.choice([-8, -1, 1, 8]) if rng.random() < 0.1 else 0), 0)
    return max(length, 0).to_bytes(8, "little") + text + rng.randbytes(size)


def test_same_verdict_as_the_package_on_damaged_files(tmp_path: Path) -> None:
    rng = random.Random(20)
    path = tmp_path / "x.safetensors"
    seen: Counter[str] = Counter()
    for _ in range(3000):
        data = damaged_file(rng)
        path.write_bytes(data)
        theirs, (ours, message) = package_reads(data), we_read(path)
        if ours == theirs:
            seen["both read" if ours is not None else "both refuse"] += 1
        elif ours is None:
            reason = next((text for text in STRICTER if text in message), None)
            assert reason is not None, (message, data)
            seen[reason] += 1
        else:
            assert theirs is None, data
            reason = next((text for text in LAXER if re.search(text.encode(), data)), None)
            assert reason is not None, data
            seen[reason] += 1
    assert seen["both read"] > 300, seen
    assert seen["both refuse"] > 700, seen
    assert {*list(STRICTER)[:4]} <= seen.keys(), seen  # the last is met once in 10,000 files; it has a test below


def test_the_package_accepts_an_empty_tensor_that_torch_cannot_hold(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"w": {"dtype": "U8", "shape": [0, 2**62, 4], "data_offsets": [0, 0]}})
    assert package_reads(path.read_bytes()) == {"w": ("U8", [0, 2**62, 4], b"")}
    with pytest.raises(RuntimeError):
        torch.empty(0, 2**62, 4)
    with pytest.raises(InputError, match="impossible shape"):
        open_safetensors(path)


def test_tensor_info_is_immutable_and_hashable(tmp_path: Path) -> None:
    info = TensorInfo("w", "BF16", (2, 3), tmp_path, 64, 12)
    with pytest.raises(AttributeError):
        info.offset = 0  # type: ignore[misc]
    assert hash(info) == hash(TensorInfo("w", "BF16", (2, 3), tmp_path, 64, 12))
    assert info.parameters == 6
