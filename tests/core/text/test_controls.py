"""The two kinds of private-use text: unforgeable, and never mistaken for one another."""

from lmx.core.text.controls import ControlTokens, StandIns
from lmx.core.text.files import AddedToken

TOKENS = [AddedToken(0, "<s>", special=True), AddedToken(1, "</s>", special=True), AddedToken(2, "<s>x", special=True)]


def test_stand_ins_avoid_the_conversation_and_each_other() -> None:
    typed = "".join(map(chr, range(0xF0000, 0xF8000)))
    stand_ins = StandIns([typed])
    made = {stand_ins.of(str(number)) for number in range(1000)}
    assert len(made) == 1000
    assert made.isdisjoint(typed)
    assert stand_ins.of("7") == stand_ins.of("7")
    assert stand_ins.restore(typed + stand_ins.of("seven") + stand_ins.of("7")) == typed + "seven7"


def test_restoring_leaves_every_sealed_name_alone() -> None:
    """However many stand-ins there are, none is a character of a sealed name."""
    stand_ins = StandIns(())
    for number in range(60_000):
        stand_ins.of(str(number))
    for _ in range(20):
        for name in ControlTokens(TOKENS).sealed.values():
            assert stand_ins.restore(name) == name


def test_sealed_names_are_new_each_time() -> None:
    assert ControlTokens(TOKENS).sealed != ControlTokens(TOKENS).sealed


def test_the_longest_token_wins_as_in_the_tokenizer() -> None:
    controls = ControlTokens(TOKENS)
    assert controls.seal("a<s>x<s></s>") == "a" + "".join(controls.sealed[name] for name in ("<s>x", "<s>", "</s>"))


def test_escaped_text_spells_and_completes_no_control_token() -> None:
    controls = ControlTokens(TOKENS)
    for text in ("<s>", "</s>", " <s>x ", "<", "s>", "<s", "a<", ">b", "</", "/s> and <", "x"):
        for before in ("", "<", "</", "<s>", "<s"):
            for after in ("", ">", "s>", "x", "/s>"):
                stand_ins = StandIns([text])
                escaped = controls.escape(text, stand_ins)
                assert stand_ins.restore(escaped) == text
                trimmed = escaped.strip()
                alone = controls.seal(before) + trimmed + controls.seal(after)
                assert controls.seal(before + trimmed + after) == alone
