"""TAGC's packets are added without being decoded, and decode to the exact sum of what members kept."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from staged import rounds
from thinwire.aggregators import Mean, WeightedMean
from thinwire.codecs import feedback, parse, tagc, topk
from thinwire.codecs.tagc import Bitmap, Largest, Peeled
from thinwire.errors import ConfigError, PacketError

N = 40_000


def _given(members: int, n: int = N, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=g) ** 3 for _ in range(members)]


def _kept(x: Tensor, share: float) -> Tensor:
    return topk(share).decode(topk(share).encode(x, 0), len(x), 0)


def _whole(x: Tensor, largest: float) -> Tensor:
    """As whole numbers of the unit that all agree on."""
    unit = 2.0 ** (torch.tensor(largest).frexp().exponent.item() - 23)
    return (x.double() / unit).round(), unit  # type: ignore[return-value]


@pytest.mark.parametrize("members", [1, 2, 4, 5])
def test_the_exact_sum_of_the_kept(members: int) -> None:
    """Shares small enough for the union: what is kept arrives as whole numbers, but for a few in thousands.

    Two blocks may share all three rows; then neither is sent by anybody, and the residual has it.
    """
    given = _given(members)
    kept = [_kept(x, 0.3 / members) for x in given]
    largest = max(float(x.abs().max()) for x in kept)
    results = rounds(feedback(tagc(0.3 / members, 0.5)), [given])
    sent = [x - done[0].carried.own["residual"] for x, done in zip(given, results, strict=True)]
    went = torch.stack(sent).any(dim=0)
    assert went.sum() >= 0.995 * torch.stack(kept).any(dim=0).sum()
    total = torch.zeros(N, dtype=torch.float64)
    for mine, read in zip(kept, sent, strict=True):
        whole, unit = _whole(mine * went, largest)
        total += whole
        torch.testing.assert_close(read, (whole * unit).float(), rtol=0, atol=1e-6)
    assert torch.equal(results[0][0].update, (total * unit).float() / members)


def test_an_element_too_many_stays_in_the_residual_and_goes_later() -> None:
    """Four members that keep a fifth each fill a table for 38 of 100: some stay out, exactly, and others in turn."""
    given = _given(4)
    how = feedback(tagc(0.2, 0.5))
    results = rounds(how, [given, [torch.zeros(N)] * 4])
    sent = [x - done[0].carried.own["residual"] for x, done in zip(given, results, strict=True)]
    share = torch.stack(sent).any(dim=0).float().mean().item()
    assert 0.3 < share < 0.4
    torch.testing.assert_close(results[0][0].update, torch.stack(sent).sum(dim=0) / 4, rtol=0, atol=1e-5)
    for x, mine in zip(given, sent, strict=True):
        here = mine != 0
        torch.testing.assert_close(mine[here], _kept(x, 0.2)[here], rtol=0, atol=1e-5)
    again = results[0][1].update != 0
    assert (again & (torch.stack(sent) == 0).all(dim=0)).any(), "what stayed out has gone"


def test_weights_are_the_methods() -> None:
    """Whole numbers cannot be weighed: every member decodes all packets, and weighs."""
    given = _given(3)
    results = rounds(feedback(tagc(0.1, 0.5)), [given], rule=WeightedMean(), weights=[1.0, 2.0, 5.0])
    sent = [x - done[0].carried.own["residual"] for x, done in zip(given, results, strict=True)]
    due = (sent[0] + 2 * sent[1] + 5 * sent[2]) / 8
    torch.testing.assert_close(results[0][0].update, due, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 65, 300, 5000])
def test_vectors_too_short_for_a_table_are_sent_whole(n: int) -> None:
    given = _given(3, n)
    results = rounds(tagc(1, 0.5), [given])
    assert results[0][0].update.shape == (n,)
    if n:
        torch.testing.assert_close(results[0][0].update, torch.stack(given).mean(dim=0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-30, 1e30])
def test_any_size_of_numbers(scale: float) -> None:
    given = [scale * x for x in _given(2, 6000)]
    ((done,), _) = rounds(feedback(tagc(0.1, 0.5)), [given])
    assert done.update.isfinite().all()
    error = (done.update - (_kept(given[0], 0.1) + _kept(given[1], 0.1)) / 2).abs().max()
    assert error <= 1e-5 * max(float(x.abs().max()) for x in given)


def test_packets_are_added_in_any_order() -> None:
    union = torch.rand(N, generator=torch.Generator().manual_seed(0)) < 0.3
    codec = Peeled(union, 2.0**-20, 0.5, key=3)
    packets = [codec.encode(x * union, 0) for x in _given(3)]
    sums = [codec.add(order, N)["sum"] for order in itertools.permutations(packets)]
    assert all(torch.equal(total, sums[0]) for total in sums)
    parts = [codec.decode(packet, N, 0) for packet in packets]
    torch.testing.assert_close(codec.decode({"sum": sums[0]}, N, 0), sum(parts[1:], parts[0]), rtol=0, atol=1e-5)
    with pytest.raises(PacketError):
        codec.add([packets[0], {"sum": packets[1]["sum"][:-1]}], N)
    with pytest.raises(PacketError):
        codec.decode({"sum": packets[0]["sum"].float()}, N, 0)


def test_what_is_outside_the_union_is_not_sent() -> None:
    union = torch.zeros(N, dtype=torch.bool)
    union[::7] = True
    codec = Peeled(union, 2.0**-20, 0.5, key=3)
    x = _given(1)[0]
    decoded = codec.decode(codec.encode(x, 0), N, 0)
    torch.testing.assert_close(decoded, x * union, rtol=0, atol=1e-6)


def test_bitmaps_and_their_union() -> None:
    x = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    fields = Bitmap().encode(x, 0)
    assert fields["bit"].tolist() == [0b00010000, 0b00000011]  # planar
    assert Bitmap().decode(fields, 9, 0).tolist() == (x > 0).float().tolist()
    assert Largest().combine(torch.tensor([[0.0, 1, 0], [0, 1, 1]]), torch.ones(2)).tolist() == [0, 1, 1]


def test_options_change_the_result() -> None:
    given = _given(4)
    last = [rounds(how, [given], rule=Mean())[0][0].update for how in (tagc(), tagc(0.1), tagc(0.2, 0.7))]
    assert not any(torch.equal(a, b) for i, a in enumerate(last) for b in last[:i])


def test_expressions_and_refusals() -> None:
    assert parse("tagc").spec == "tagc(share=0.2, cells=0.5)"
    for share in (0, 1.5, True, "1"):
        with pytest.raises(ConfigError, match=r"tagc is to keep a share of .*\n  expected  a number in \(0, 1\]"):
            tagc(share)  # type: ignore[arg-type]
    for cells in (0, 1, 2.0, True, "1"):
        with pytest.raises(ConfigError, match=r"tagc is to have .* cells an element\n  expected  a number between"):
            tagc(0.2, cells)  # type: ignore[arg-type]
