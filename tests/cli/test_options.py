import pytest

from lmx.cli.facts import human_bytes, human_count
from lmx.cli.options import RuntimeOptions, SamplingOptions, parse_size
from lmx.core.errors import UsageError
from lmx.core.sampling import Sampling

SIZES = [("20GB", 20 * 10**9), ("1.5 GiB", 3 << 29), ("512m", 512 * 10**6), ("7", 7), ("2KiB", 2048), ("1tb", 10**12)]


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--gpu-memory", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1XB", "1e9", "0x10", "1 0", "٣GB", "1I"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="--gpu-memory"):
        parse_size("--gpu-memory", text)


def test_sampling_options_lie_over_the_checkpoints() -> None:
    defaults = Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.1, repeat_penalty=1.1)
    assert SamplingOptions().over(defaults) == defaults
    given = SamplingOptions(0.0, 1, 0.5, 0.2, 1.2, 0.3, 0.4, 9)
    assert given.over(defaults) == Sampling(0.0, 1, 0.5, 0.2, 1.2, 0.3, 0.4, 9)


def test_runtime_options_know_their_memory() -> None:
    assert RuntimeOptions().gpu_memory_bytes is None
    assert RuntimeOptions(gpu_memory="1KB").gpu_memory_bytes == 1000


def test_numbers_for_people() -> None:
    assert [human_count(n) for n in (0, 999, 1000, 46_702_792_704, 999_999)] == ["0", "999", "1.0K", "46.7B", "1.0M"]
    assert [human_bytes(n) for n in (12, 4_105_472, 93 * 10**9)] == ["12 bytes", "4.1 MB", "93.0 GB"]
