from lmx.cli.facts import share_line
from lmx.core.placement import Share


def test_a_line_says_what_lies_on_a_device() -> None:
    card = Share("cuda:0", layers=27, banks=19, embed=False, head=True, nbytes=11_200_000_000)
    assert share_line(card, 32) == "cuda:0: 27 of 32 layers, 19 banks of experts, head; 11.2 GB with room for the state"
    host = Share("cpu", layers=0, banks=1, embed=True, head=False, nbytes=900_000_000)
    assert share_line(host, 32) == "cpu: 1 bank of experts, embedding; 900.0 MB"
