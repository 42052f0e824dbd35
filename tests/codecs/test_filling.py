"""Demand filling against every choice of messages, and against the rule step by step."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.codecs import fill_demand

LEVELS = st.integers(0, 4)


def _filled(demand: Tensor, confidence: Tensor, chosen: Tensor) -> float:
    return torch.minimum(demand, (confidence * chosen).sum(dim=0)).sum().item()


def _step_by_step(demand: Tensor, confidence: Tensor, budget: int) -> Tensor:
    left, chosen = demand.clone(), torch.zeros_like(confidence, dtype=torch.bool)
    for _ in range(budget):
        gain = torch.minimum(left, confidence).masked_fill(chosen, 0)
        best = int(gain.argmax())
        sender, cell = divmod(best, len(demand))
        if gain[sender, cell] == 0:
            break
        chosen[sender, cell] = True
        left[cell] = max(0.0, float(left[cell] - confidence[sender, cell]))
    return chosen


@settings(deadline=None, max_examples=40)
@given(st.lists(LEVELS, min_size=4, max_size=4), st.lists(LEVELS, min_size=8, max_size=8), st.integers(0, 4))
def test_no_other_choice_fills_more(wants: list[int], offers: list[int], budget: int) -> None:
    demand, confidence = torch.tensor(wants).float(), torch.tensor(offers).float().view(2, 4)
    chosen = fill_demand(demand, confidence, budget)
    assert chosen.sum() <= budget
    best = 0.0
    for messages in itertools.combinations(range(8), budget):
        other = torch.zeros(8, dtype=torch.bool)
        other[list(messages)] = True
        best = max(best, _filled(demand, confidence, other.view(2, 4)))
    assert _filled(demand, confidence, chosen) == best


def test_three_senders_and_six_cells_step_by_step() -> None:
    g = torch.Generator().manual_seed(0)
    for budget in range(19):
        demand, confidence = torch.rand(6, generator=g), torch.rand(3, 6, generator=g)
        chosen, other = fill_demand(demand, confidence, budget), _step_by_step(demand, confidence, budget)
        assert torch.equal(chosen.sum(dim=0), other.sum(dim=0))
        assert abs(_filled(demand, confidence, chosen) - _filled(demand, confidence, other)) < 1e-6


def test_once_is_enough_where_one_sender_fills_a_cell() -> None:
    demand = torch.tensor([1.0, 1.0, 0.0])
    confidence = torch.tensor([[1.0, 0.4, 1.0], [1.0, 0.5, 1.0], [0.2, 0.3, 1.0]])
    chosen = fill_demand(demand, confidence, 9)
    assert chosen.tolist() == [[True, True, False], [False, True, False], [False, True, False]]
