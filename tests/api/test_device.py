"""How much of which card a model may take."""

import pytest
import torch

from lmx.core.errors import UsageError
from lmx.device import card_budget, choose_budgets, planned_budgets


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [80 << 30, 6 << 30]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (free[card], 80 << 30))


@pytest.mark.usefixtures("two_cards")
def test_what_is_free_less_room_for_activations() -> None:
    budgets = choose_budgets("auto")
    assert [str(budget.device) for budget in budgets] == ["cuda:0", "cuda:1"]
    assert [budget.nbytes for budget in budgets] == [79 << 30, (6 << 30) * 7 // 8]
    assert choose_budgets(None) == choose_budgets("cuda") == budgets


@pytest.mark.usefixtures("two_cards")
def test_a_limit_is_that_of_each_card() -> None:
    assert [budget.nbytes for budget in choose_budgets("cuda", 12 << 30)] == [11 << 30, (6 << 30) * 7 // 8]
    assert planned_budgets(12 << 30) == choose_budgets("cuda", 12 << 30)


def test_no_card_no_budget() -> None:
    assert choose_budgets("cpu") == ()
    with pytest.raises(UsageError, match="CUDA"):
        choose_budgets("cpu", 1 << 30)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_a_plan_can_be_made_for_a_card_that_is_not_here() -> None:
    assert planned_budgets() == ()
    assert planned_budgets(8 << 30) == (card_budget(0, 8 << 30),)
