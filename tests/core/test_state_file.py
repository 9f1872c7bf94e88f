"""States on disk: what is saved comes back to the bit, and a file that is not such a state is refused in a sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.families import FAMILIES, RECURRENT, FamilyRow, pair, random_ids
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmx.core.errors import InputError, NotFoundError, UsageError
from lmx.core.model import AnyState, LanguageModel
from lmx.core.state import StateError
from lmx.core.state_file import load_state

Tensors = dict[str, Tensor]
About = dict[str, Any]

# Of each family one model, of Mixtral both kinds of cache.
CASES = [(row, 0) for row in FAMILIES] + [(FAMILIES[0], 2)]


def saved(model: LanguageModel, path: Path, held: int = 11) -> AnyState:
    """A state after a padded turn, on disk and in memory."""
    ids = random_ids(2, held)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    state = model.make_state(2)
    with torch.inference_mode():
        model(ids, attention_mask=mask, state=state)
    state.save(path)
    return state


def continued(model: LanguageModel, state: AnyState) -> list[Tensor]:
    """The logits of a few more calls."""
    with torch.inference_mode():
        return [model(part, state=state).logits for part in random_ids(2, 9, seed=4).split((5, 1, 1, 2), 1)]


@pytest.mark.parametrize(("row", "index"), CASES, ids=str)
def test_a_saved_state_continues_to_the_same_bits(row: FamilyRow, index: int, tmp_path: Path) -> None:
    model = pair(row, index).ours
    state = saved(model, tmp_path / "state")
    loaded = model.load_state(tmp_path / "state")
    (tmp_path / "state").unlink()  # what was loaded is a copy, not a view of the file
    assert (loaded.family, loaded.length, loaded.batch_size) == (row.model_type, 11, 2)
    assert loaded.lengths is not None
    assert loaded.lengths.tolist() == [11, 7]
    for mine, theirs in zip(continued(model, loaded), continued(model, state), strict=True):
        assert torch.equal(mine, theirs)


def test_a_state_of_bfloat16_comes_back_as_such(tmp_path: Path) -> None:
    model = pair(RECURRENT[1], 0).ours
    wide, model = model, type(model)(type(model.decoder)(model.config)).to(torch.bfloat16).eval()
    model.reset_parameters()
    state = saved(model, tmp_path / "state")
    for mine, theirs in zip(
        continued(model, model.load_state(tmp_path / "state")), continued(model, state), strict=True
    ):
        assert torch.equal(mine, theirs)
    with pytest.raises(StateError, match="does not fit"):
        wide.load_state(tmp_path / "state")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    model = pair(RECURRENT[0], 0).ours
    saved(model, tmp_path / "state")
    state = saved(model, tmp_path / "state", held=20)
    assert model.load_state(tmp_path / "state").length == state.length == 20
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("states") / "state"
    saved(pair(FAMILIES[0], 0).ours, path)
    return path


@pytest.mark.parametrize(
    "other", [(FAMILIES[0], 1), (FAMILIES[1], 0), (RECURRENT[0], 0)], ids=["sizes", "experts", "recurrent"]
)
def test_a_state_of_another_model(other: tuple[FamilyRow, int], honest: Path) -> None:
    with pytest.raises(StateError, match="does not fit"):
        pair(*other).ours.load_state(honest)


def test_a_window_of_another_width(tmp_path: Path) -> None:
    row, narrow, wide = RECURRENT[1], 1, 1 + 2  # indices whose windows differ
    saved(pair(row, narrow).ours, tmp_path / "state")
    with pytest.raises(StateError, match="does not fit"):
        pair(row, wide).ours.load_state(tmp_path / "state")


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -200, -1])
def test_truncated(kept: int, honest: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(honest.read_bytes()[:kept])
    with pytest.raises(InputError):
        load_state(tmp_path / "state")


def test_not_there_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        load_state(tmp_path / "state")
    with pytest.raises(InputError):
        load_state(tmp_path)


def test_every_flipped_byte_of_the_header_is_refused_or_harmless(honest: Path, tmp_path: Path) -> None:
    data = honest.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    model = pair(FAMILIES[0], 0).ours
    for place in range(0, header, 3):
        (tmp_path / "state").write_bytes(data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :])
        try:
            state = model.load_state(tmp_path / "state")
        except (InputError, UsageError):
            continue
        assert state.length == 11


def removed(name: str) -> Callable[[Tensors, About], None]:
    return lambda tensors, about: (tensors if name in tensors else about).pop(name)


def replaced(name: str, value: Any) -> Callable[[Tensors, About], None]:
    return lambda tensors, about: (tensors if isinstance(value, Tensor) else about).update({name: value})


KEYS = "layers.0.keys"
HOSTILE: dict[str, Callable[[Tensors, About], None]] = {
    "no version": removed("version"),
    "another version": replaced("version", 2),
    "no family": removed("family"),
    "a family that is a list": replaced("family", ["mixtral"]),
    "no layers": removed("layers"),
    "layers that are a number": replaced("layers", 2),
    "an unknown kind": replaced("layers", ["kv", "pickle"]),
    "a kind that cannot be looked up": replaced("layers", [["kv"], {}]),
    "a kind that the tensors are not": replaced("layers", ["kv", "mamba"]),
    "more kinds than tensors": replaced("layers", ["kv"] * 3),
    "fewer kinds than tensors": replaced("layers", ["kv"]),
    "a million kinds": replaced("layers", ["kv"] * 1_000_000),
    "a huge length": replaced("length", 2**31 - 1),
    "a length beyond 64 bits": replaced("length", 2**80),
    "a negative length": replaced("length", -1),
    "a length that is no number": replaced("length", "11"),
    "a length that is true": replaced("length", True),
    "a fractional length": replaced("length", 11.5),
    "another length": replaced("length", 10),
    "a huge batch": replaced("batch_size", 2**31 - 1),
    "no rows": replaced("batch_size", 0),
    "another batch": replaced("batch_size", 1),
    "a missing tensor": removed(KEYS),
    "one tensor more": replaced("layers.0.extra", torch.zeros(2)),
    "a tensor outside of the layers": replaced("weight", torch.zeros(2)),
    "a layer by another spelling": replaced("layers.00.keys", torch.zeros(2, 1, 11, 8)),
    "a layer in other digits": replaced("layers.\u0660.keys", torch.zeros(2, 1, 11, 8)),
    "a layer that is far out": replaced("layers.4000.keys", torch.zeros(2, 1, 11, 8)),
    "keys without dimensions": replaced(KEYS, torch.tensor(1.0)),
    "keys of two dimensions": replaced(KEYS, torch.zeros(2, 11)),
    "keys unlike the values": replaced(KEYS, torch.zeros(2, 1, 11, 3)),
    "keys of another dtype": replaced(KEYS, torch.zeros(2, 1, 11, 8, dtype=torch.int8)),
    "row lengths of another dtype": replaced("lengths", torch.tensor([11.0, 7.0])),
    "row lengths of another shape": replaced("lengths", torch.tensor([[11, 7]])),
    "row lengths without dimensions": replaced("lengths", torch.tensor(11)),
    "a negative row length": replaced("lengths", torch.tensor([11, -7])),
    "row lengths beyond the length": replaced("lengths", torch.tensor([11, 12])),
    "row lengths short of the length": replaced("lengths", torch.tensor([10, 7])),
}


def write(honest: Path, path: Path, change: Callable[[Tensors, About], None]) -> None:
    tensors = load_file(honest)
    about = {"version": 1, "family": "mixtral", "layers": ["kv", "kv"], "batch_size": 2, "length": 11}
    change(tensors, about)
    save_file(tensors, path, {"lmx_state": json.dumps(about)})


def test_what_is_written_here_unchanged_is_no_error(honest: Path, tmp_path: Path) -> None:
    write(honest, tmp_path / "state", lambda tensors, about: None)
    assert pair(FAMILIES[0], 0).ours.load_state(tmp_path / "state").length == 11


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_hostile(change: Callable[[Tensors, About], None], honest: Path, tmp_path: Path) -> None:
    write(honest, tmp_path / "state", change)
    with pytest.raises(InputError) as caught:
        pair(FAMILIES[0], 0).ours.load_state(tmp_path / "state")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400 + len(str(tmp_path))


def test_a_huge_batch_of_nothing_costs_nothing(tmp_path: Path) -> None:
    model = pair(FAMILIES[0], 0).ours
    shapes = {name: tensor.shape for name, tensor in model.make_state(1).layers[0].tensors(0).items()}
    rows = 2**31 - 1
    tensors = {
        f"layers.{layer}.{name}": torch.empty(0).as_strided((rows, shape[1], 0, shape[3]), (1, 1, 1, 1))
        for layer in range(model.config.layers)
        for name, shape in shapes.items()
    }
    about = {"version": 1, "family": "mixtral", "layers": ["kv"] * model.config.layers, "length": 0}
    save_file(tensors, tmp_path / "state", {"lmx_state": json.dumps(about | {"batch_size": rows})})
    assert model.load_state(tmp_path / "state").nbytes == 0


def test_metadata_that_is_no_object(honest: Path, tmp_path: Path) -> None:
    for text in ("", "[]", "1", "{", '{"version": NaN}', '{"version": 1, "version": 1}', "[" * 100_000):
        save_file(load_file(honest), tmp_path / "state", {"lmx_state": text})
        with pytest.raises(InputError):
            load_state(tmp_path / "state")
    save_file(load_file(honest), tmp_path / "state")
    with pytest.raises(InputError, match="no saved state"):
        load_state(tmp_path / "state")
