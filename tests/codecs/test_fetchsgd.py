"""FetchSGD with room enough is SGD with momentum; with little, it finds what is large in the sum."""

from __future__ import annotations

import pytest
import torch

from staged import rounds
from thinwire.codecs import feedback, fetchsgd, parse
from thinwire.errors import ConfigError

N = 1000


def _given(count: int, members: int) -> list[list[torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [list(torch.randint(-50, 50, (members, N), generator=g).float()) for _ in range(count)]


@pytest.mark.parametrize("members", [1, 2, 4])
def test_with_room_for_all_it_is_sgd_with_momentum(members: int) -> None:
    """Exact: whole numbers, sums of powers of a half."""
    given = _given(4, members)
    (done, *_) = rounds(fetchsgd(1, width=1 << 16, momentum=0.5, masking=False), given)
    momentum = torch.zeros(N)
    for vectors, found in zip(given, done, strict=True):
        momentum = 0.5 * momentum + torch.stack(vectors).sum(dim=0) / members
        assert torch.equal(found.update, momentum)


def test_masking_takes_the_momentum_of_what_was_sent() -> None:
    given = _given(3, 2)
    (done, _) = rounds(fetchsgd(1, width=1 << 16, momentum=0.5), given)
    for vectors, found in zip(given, done, strict=True):
        assert torch.equal(found.update, (vectors[0] + vectors[1]) / 2)


def test_what_no_member_finds_large_is_found_in_the_sum() -> None:
    g = torch.Generator().manual_seed(1)
    hidden = torch.zeros(N)
    hidden[[3, 500, 999]] = 2.0
    noise = 3 * torch.randn(3, N, generator=g)
    noise = torch.cat([noise, -noise.sum(dim=0, keepdim=True)])  # cancels
    (done, *_) = rounds(fetchsgd(0.003, width=500), [[hidden + row for row in noise]])
    assert done[0].update.nonzero().flatten().tolist() == [3, 500, 999]
    torch.testing.assert_close(done[0].update, hidden, rtol=0, atol=1e-4)


def test_what_is_not_sent_waits_and_is_sent_later() -> None:
    """Ten elements, one a round: after ten rounds all have gone, each once, and the sketches are empty."""
    x = torch.zeros(N)
    x[::100] = torch.arange(1.0, 11)
    given = [[x, x]] + [[torch.zeros(N)] * 2] * 11
    (done, _) = rounds(fetchsgd(0.001, width=10_000, momentum=0.0), given)
    updates = [each.update for each in done]
    assert [int(u.abs().argmax()) for u in updates[:10]] == list(range(900, -1, -100))
    assert torch.equal(sum(updates[1:], updates[0]), x)
    assert not done[-1].carried.stages["error"].any()


def test_members_hold_nothing_of_their_own_and_send_the_sketch_alone() -> None:
    (done, _) = rounds(fetchsgd(0.01, width=100), _given(1, 2))
    assert not done[0].carried.own
    assert {name: len(value) for name, value in done[0].carried.stages.items()} == {"momentum": 500, "error": 500}


def test_every_option_changes_the_result() -> None:
    given, base = _given(3, 2), {"share": 0.1, "width": 200}
    changes: list[dict[str, object]] = [
        {},
        {"share": 0.2},
        {"width": 300},
        {"rows": 3},
        {"momentum": 0.1},
        {"masking": False},
    ]
    last = [rounds(fetchsgd(**{**base, **change}), given)[0][-1].update for change in changes]  # type: ignore[arg-type]
    assert not any(torch.equal(a, b) for i, a in enumerate(last) for b in last[:i])


def test_expressions_and_refusals() -> None:
    for text in (
        "fetchsgd(share=0.01, width=100)",
        "fetchsgd(share=0.01, width=9, rows=3, momentum=0.0, masking=False)",
    ):
        assert parse(text).spec == text
    for share in (0, 1.5, True, "1"):
        with pytest.raises(ConfigError, match=r"fetchsgd is to send a share of .*\n  expected  a number in \(0, 1\]"):
            fetchsgd(share, 10)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fetchsgd is to have rows of 0 cells"):
        fetchsgd(0.1, 0)
    with pytest.raises(ConfigError, match="fetchsgd is to have 2 rows"):
        fetchsgd(0.1, 10, rows=2)
    for momentum in (-0.1, 1, True, None):
        with pytest.raises(ConfigError, match=r"fetchsgd with a momentum of .*\n  expected  a number from 0"):
            fetchsgd(0.1, 10, momentum=momentum)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fetchsgd with masking 0\n  expected  True or False"):
        fetchsgd(0.1, 10, masking=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="feedback around fetchsgd"):
        feedback(fetchsgd(0.1, 10))
