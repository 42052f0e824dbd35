"""Rounds in a graph: who is waited for, what is sent, and what becomes of a round in which somebody fails."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import thinwire
from small import adamw, local_steps, make_model, same, train
from thinwire import DivergedError, Network, PeerLost, gossip, late_merge, local_sgd
from thinwire.links.faulty import Tampered, flip
from thinwire.links.local import run
from thinwire.packet import wire_bytes
from thinwire.rounds import Skipped
from thinwire.topologies import Exponential, RandomPairs, Ring


def moved(link, method, values: list[float], *, rounds: int = 1, change=None, observer=None) -> list[float]:
    """One scalar a member, in rounds without training: what it is after each."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen, link = [], link if change is None else Tampered(link, change)
    with thinwire.synchronize(model, optimizer, method, link, observer=observer) as sync:
        model.weight.data.fill_(values[link.rank])
        for _ in range(rounds):
            model.weight.grad = torch.zeros(1, 1)
            optimizer.step()
            seen.append(model.weight.item())
        assert sync.committed + sync.skipped == rounds
    return seen


def damaging(rank: int, sender: int):
    """What `rank` receives of rounds from `sender` is damaged, always."""

    def change(purpose: str, each: int, count: int, buffer: Tensor) -> Tensor:
        return flip(buffer) if purpose == "rounds" and each == sender else buffer

    return lambda link: change if link.rank == rank else None


def test_a_round_is_one_packet_to_each_neighbour_and_no_verdict():
    """Five members, no buffers: a ring's round costs two packets, one of one_peer costs one."""
    size = wire_bytes("fp32", {"value": (torch.float32, sum(p.numel() for p in make_model().parameters()))})

    def sent(topology):
        def member(link):
            train(link, gossip(every=2, topology=topology), 6)
            return link.meter.by_purpose()["rounds"]

        return [(traffic.sent_bytes, traffic.received_bytes) for traffic in run(5, member)]

    assert sent(Ring()) == [(3 * 2 * size, 3 * 2 * size)] * 5
    assert sent(Exponential()) == [(3 * size, 3 * size)] * 5


def test_a_member_waits_for_its_neighbours_and_for_nobody_else():
    """In simulated time, exactly. Member 0 takes 10 s a step, the others 1 s: after a round of a ring of eight its
    neighbours are as late as it is, theirs after another round, and the one across the ring after four."""
    network = Network(step_s=[10.0] + [1.0] * 7)

    def member(link):
        model = make_model()
        optimizer = adamw(model)
        clock = []
        with thinwire.synchronize(model, optimizer, gossip(every=1), link):
            start = link.now()
            for step in range(4):
                local_steps(model, optimizer, link.rank, range(step, step + 1))
                clock.append(link.now() - start)
        return clock

    clocks = run(8, member, network)
    assert clocks[1] == pytest.approx([10.0, 20.0, 30.0, 40.0])
    assert clocks[2] == pytest.approx([1.0, 11.0, 21.0, 31.0])
    assert clocks[4] == pytest.approx([1.0, 2.0, 3.0, 13.0])

    def in_a_group(link):
        with thinwire.synchronize(model := make_model(), adam := adamw(model), local_sgd(every=1), link):
            local_steps(model, adam, link.rank, range(1))
            return link.now()

    assert min(run(8, in_a_group, network)) >= 10.0


def test_who_idles_waits_for_nobody():
    network = Network(step_s=[10.0, 1.0, 1.0, 1.0])

    def member(link):
        model = make_model()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, gossip(every=1, topology=RandomPairs(0)), link):
            start = link.now()
            local_steps(model, optimizer, link.rank, range(3))
            return link.now() - start

    assert run(4, member, network) == pytest.approx([30.0, 3.0, 3.0, 3.0])


def test_a_damaged_packet_is_left_out_and_told(caplog):
    """Four in a ring; what member 1 sends to member 2 is damaged: its third goes to member 2 itself, in one round."""
    outcomes = {rank: [] for rank in range(4)}
    hit = damaging(2, 1)

    def member(link):
        return moved(
            link, gossip(every=1), [0.0, 9.0, 18.0, 27.0], change=hit(link), observer=outcomes[link.rank].append
        )

    assert [seen[0] for seen in run(4, member)] == pytest.approx([12.0, 9.0, 21.0, 15.0])
    assert [outcomes[rank][0].ranks for rank in range(4)] == [(0, 1, 3), (0, 1, 2), (2, 3), (0, 2, 3)]
    assert "round 0, fragment 0: left out, its weight going to this member: member 1: the checksum" in caplog.text
    assert "no finite values" not in caplog.text


def test_a_line_that_damages_everything_is_not_taken_for_a_member_that_diverges():
    hit = damaging(2, 1)
    seen = run(4, lambda link: moved(link, gossip(every=1), [0.0, 9.0, 18.0, 27.0], rounds=6, change=hit(link)))
    assert all(math.isfinite(value) for values in seen for value in values)


def test_a_neighbour_without_finite_values_is_left_out_and_healed(caplog):
    """Its neighbours keep its third; it takes the mean of theirs, and counts again in the next round."""
    outcomes = {rank: [] for rank in range(4)}
    values = [0.0, math.nan, 18.0, 27.0]

    def member(link):
        return moved(link, gossip(every=1), values, rounds=2, observer=outcomes[link.rank].append)

    seen = run(4, member)
    assert [each[0] for each in seen] == pytest.approx([9.0, 9.0, 21.0, 15.0])
    assert [each[1] for each in seen] == pytest.approx([11.0, 13.0, 15.0, 15.0])
    assert [outcomes[rank][0].ranks for rank in range(4)] == [(0, 3), (0, 2), (2, 3), (0, 2, 3)]
    assert outcomes[0][1].ranks == (0, 1, 3)
    assert "round 0: member 1 had no finite values and was left out" in caplog.text


def test_one_whose_neighbours_have_no_finite_values_either_goes_on_for_a_while():
    """Two rounds are skipped; in the third in a row the run is given up."""
    outcomes = []

    def member(link):
        return moved(link, gossip(every=1), [math.inf] * 3, rounds=2, observer=outcomes.append)

    run(3, member)
    assert {type(outcome) for outcome in outcomes} == {Skipped}
    assert {outcome.reason for outcome in outcomes} == {"no member had finite values to contribute"}
    with pytest.raises(DivergedError, match="no member had finite values"):
        run(3, lambda link: moved(link, gossip(every=1), [math.inf] * 3, rounds=3))


def test_a_lost_neighbour_is_named_and_what_was_committed_is_kept():
    """Five in a ring; member 0 fails before round 2. Its neighbours name it, the others one who had lost it."""
    lost, kept = {}, {}

    def member(link):
        model = make_model()
        optimizer = adamw(model)
        sync = thinwire.synchronize(model, optimizer, gossip(every=1), link)

        def before(number):
            if link.rank == 0 and number == 2:
                raise ZeroDivisionError("out of data")

        try:
            with sync:
                local_steps(model, optimizer, link.rank, range(6), before)
        except PeerLost as error:
            lost[link.rank], kept[link.rank] = error.ranks, sync.state_dict(rescue=True)["committed"]
            raise

    with pytest.raises(ZeroDivisionError):
        run(5, member)
    assert lost[1] == lost[4] == (0,)
    assert set(lost) == {1, 2, 3, 4}
    assert (kept[1], kept[4]) == (2, 2)


def test_after_gossip_nothing_is_compared_until_a_merge_has_taken_place():
    """The anchors of the second phase differ before it, which is no mismatch; a damaged one after it is."""
    method = late_merge(every=2, merge=6, rounds=2)

    def member(link, scribbles):
        model = make_model()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            local_steps(model, optimizer, link.rank, range(5))
            if scribbles and link.rank == 1:
                sync._states[0].anchor[3] += 1
            local_steps(model, optimizer, link.rank, range(5, 6))
        return [p.detach().clone() for p in model.parameters()]

    calm = run(3, lambda link: member(link, False))
    assert all(same(calm[0], other) for other in calm)
    with pytest.raises(thinwire.StateMismatch, match="member 1 and the rest"):
        run(3, lambda link: member(link, True))


def test_overlapped_rounds_of_a_graph_mix_what_was_sent():
    """With all of the result kept but for the local steps since: one round, by hand, through the schedule."""
    from thinwire.method import Method
    from thinwire.outer import Average, Rebase
    from thinwire.payloads import Parameters
    from thinwire.schedules import Every

    method = Method(schedule=Every(2, 1), payload=Parameters(), outer=Rebase(Average()), topology=Ring())

    def member(link):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with thinwire.synchronize(model, optimizer, method, link):
            for _ in range(3):  # sent after two steps, applied after three
                model.weight.grad = torch.full((1, 1), -3.0 * link.rank)
                optimizer.step()
        return model.weight.item()

    assert run(4, member) == pytest.approx([8.0, 9.0, 18.0, 19.0])
