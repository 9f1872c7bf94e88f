import pytest

from lmx.cli.counts import parse_counts, parse_pair
from lmx.core.errors import UsageError

GOOD = [
    (["512"], [512]),
    (["128,512"], [128, 512]),
    (["128", "512,64"], [128, 512, 64]),
    (["0-4096+1024"], [0, 1024, 2048, 3072, 4096]),
    (["8-128*2"], [8, 16, 32, 64, 128]),
    (["8-100*3"], [8, 24, 72]),
    (["3-6"], [3, 4, 5, 6]),
    (["7-7"], [7]),
    (["7-7*2,7"], [7]),
    (["0"], [0]),
]


@pytest.mark.parametrize(("texts", "counts"), GOOD)
def test_numbers_lists_and_ranges(texts: list[str], counts: list[int]) -> None:
    assert parse_counts("-p", texts) == counts


@pytest.mark.parametrize(
    "text",
    ["", "x", "-1", "1,,2", "1-", "5-1", "0-8*2", "1-9*1", "1-9+0", "1-9-2", "1e3", "٣", "1-5000", "99999999999"],
)
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(UsageError, match="-p: "):
        parse_counts("-p", [text])


def test_pairs() -> None:
    assert parse_pair("-pg", "512,128") == (512, 128)
    for text in ("512", "512,0", "1,2,3", "a,b"):
        with pytest.raises(UsageError, match="-pg: "):
            parse_pair("-pg", text)
