"""DADAO among members: the bits of virtual time on every link, waiting for neighbours only, and what goes wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from node import part
from test_torch_link import members

import thinwire
from thinwire.decentralized import complete, events, linked, path, ridge, ring, run_on, simulate, star, uniform
from thinwire.errors import ConfigError, DivergedError, PacketError, PeerLost
from thinwire.links.faulty import Tampered, flip
from thinwire.links.local import alone
from thinwire.links.network import Network
from thinwire.packet import read

ZERO = torch.zeros(10, dtype=torch.float64)


def arguments(problem, **options):
    return {"smoothness": problem.smoothness, "convexity": problem.convexity, "x0": ZERO, "horizon": 12.0, **options}


def on_link(problem, gossip, network=None, work=lambda link, node: node, **options):
    def member(link):
        node = run_on(link, problem.gradients[link.rank], gossip, **arguments(problem, **options))
        return work(link, node)

    return thinwire.run(gossip.graph.nodes, member, network)


def same(nodes, others):
    return all(torch.equal(a.rows, b.rows) and a.time == b.time for a, b in zip(nodes, others, strict=True))


SLOW = Network(up_bits_per_s=1e5, latency_s=0.3, step_s=[0.1, 5.0, 0.7, 0.2])


@pytest.mark.parametrize("network", [None, SLOW], ids=["ideal", "slow and uneven"])
@pytest.mark.parametrize("graph", [ring(4), star(4), complete(4)], ids=["ring", "star", "complete"])
def test_the_bits_of_virtual_time(graph, network):
    problem = ridge(4)
    expected = simulate(problem.gradients, uniform(graph), **arguments(problem, seed=3))
    assert same(on_link(problem, uniform(graph), network, seed=3), expected.nodes)
    assert not same(on_link(problem, uniform(graph), network, seed=4), expected.nodes)


def test_alone():
    problem = ridge(1)
    node = run_on(alone(), problem.gradients[0], uniform(ring(1)), **arguments(problem))
    assert same([node], simulate(problem.gradients, uniform(ring(1)), **arguments(problem)).nodes)


def test_gradients_are_taken_beside_gossip():
    """A gradient and an exchange each take a second; only what depends on each other is one after the other."""
    problem, gossip = ridge(3), uniform(ring(3))
    took = on_link(problem, gossip, Network(latency_s=1.0, step_s=1.0), work=lambda link, node: link.now())
    assert max(took) == pytest.approx(seconds(gossip, beside=True))
    assert max(took) < 0.8 * seconds(gossip, beside=False)


def seconds(gossip, *, beside):
    """When the last member is done: a message is there a second after it was sent."""
    now, ready = [0.0] * 3, [1.0] * 3
    for event in events(gossip, 0, 12.0):
        if len(event.nodes) == 1:
            (i,) = event.nodes
            now[i] = max(now[i], ready[i]) if beside else now[i] + 1
            ready[i] = now[i] + 1
        else:
            i, j = event.nodes
            now[i], now[j] = max(now[i], now[j] + 1), max(now[j], now[i] + 1)
    return max(now)


def test_nobody_waits_for_who_is_no_neighbour():
    """On a path whose last node is slow, the first one ends long before it: there is no barrier."""
    problem, gossip = ridge(5), uniform(path(5))
    took = on_link(problem, gossip, Network(step_s=[1, 1, 1, 1, 100]), work=lambda link, node: link.now(), horizon=3.0)
    assert took[0] < took[4] - 50


def test_the_ledger_holds_one_message_each_way_for_an_event():
    problem, gossip = ridge(3), uniform(ring(3))
    ledgers = on_link(problem, gossip, work=lambda link, node: link.meter.by_purpose())
    for rank, ledger in enumerate(ledgers):
        meter = ledger["gossip"]
        mine = [event for event in events(gossip, 0, 12.0, node=rank) if len(event.nodes) == 2]
        assert meter.messages_sent == len(mine)
        assert meter.sent_bytes == meter.received_bytes
        assert 80 * len(mine) < meter.sent_bytes < 260 * len(mine), "ten float64 and a header"


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_a_busy_edge_takes_several_channels(monkeypatch, most):
    monkeypatch.setattr(linked, "_EXCHANGES", most)
    problem, gossip = ridge(3), uniform(ring(3))
    busiest = max(event.turn + 1 for event in events(gossip, 0, 12.0) if len(event.nodes) == 2)
    opened = on_link(problem, gossip, work=lambda link, node: link.opened)
    assert opened == [-(-busiest // most)] * 3
    expected = simulate(problem.gradients, gossip, **arguments(problem))
    assert same(on_link(problem, gossip), expected.nodes)


def test_real_time_waits_until_an_event_is_due():
    now, waits = [100.0], []

    def sleep(seconds):
        waits.append(seconds)
        now[0] += seconds

    pace = linked.real_time(2.0, now=lambda: now[0], sleep=sleep)
    pace(1.5)
    now[0] += 5.0  # computing took long
    pace(2.0)
    pace(6.0)
    assert waits == [3.0, 4.0]


def test_the_pace_is_asked_before_every_event():
    problem, gossip = ridge(2), uniform(path(2))
    asked = {0: [], 1: []}

    def member(link):
        run_on(link, problem.gradients[link.rank], gossip, **arguments(problem, pace=asked[link.rank].append))

    thinwire.run(2, member)
    assert asked == {rank: [event.time for event in events(gossip, 0, 12.0, node=rank)] for rank in (0, 1)}


# --- what goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd", [{"seed": 1}, {"horizon": 13.0}, {"smoothness": 99.0}, {"convexity": 0.01}, {"x0": ZERO + 1}], ids=str
)
def test_members_that_were_started_with_other_arguments(odd):
    problem, gossip = ridge(3), uniform(ring(3))

    def member(link):
        run_on(link, problem.gradients[link.rank], gossip, **arguments(problem, **(odd if link.rank == 2 else {})))

    with pytest.raises(PacketError, match=r"(?s)a packet from member \d came with .*context"):
        thinwire.run(3, member)


def test_bytes_that_were_changed_on_the_way():
    problem, gossip = ridge(2), uniform(path(2))

    def member(link):
        if link.rank == 1:
            link = Tampered(link, lambda purpose, sender, count, buffer: flip(buffer) if count == 3 else buffer)
        run_on(link, problem.gradients[link.rank], gossip, **arguments(problem))

    with pytest.raises(PacketError, match="checksum"):
        thinwire.run(2, member)


def test_an_event_of_another_time():
    """Intact, of the same run, and in its turn: but its clock is not ours."""
    problem, gossip = ridge(2), uniform(path(2))

    def late(purpose, sender, count, buffer):
        packet = read(buffer)
        return replace(packet, fields={**packet.fields, "time": packet.fields["time"] + 0.5}).to_bytes()

    def member(link):
        link = Tampered(link, late) if link.rank == 1 else link
        run_on(link, problem.gradients[link.rank], gossip, **arguments(problem))

    with pytest.raises(PacketError, match=r"member 0 sent something else than event 0 at 0\.\d+"):
        thinwire.run(2, member)


def test_a_member_that_fails_is_named_by_its_neighbours():
    problem, gossip, seen = ridge(4), uniform(ring(4)), {}

    def broken(x):
        raise OSError("out of data")

    def member(link):
        gradient = broken if link.rank == 1 else problem.gradients[link.rank]
        try:
            run_on(link, gradient, gossip, **arguments(problem, horizon=60.0))
        except PeerLost as lost:
            seen[link.rank] = str(lost)
            raise

    with pytest.raises(OSError, match="out of data"):
        thinwire.run(4, member)
    assert "lost member 1 during gossip" in seen[0] + seen[2]
    assert set(seen) == {0, 2, 3}, "the others learn of it from their neighbours: nobody hangs"


def test_a_silent_member_is_given_up_in_time():
    problem, gossip = ridge(2), uniform(path(2))

    def member(link):
        if link.rank == 1:
            _, other = link.open("gossip"), link.open("something else")
            other.exchange({}, {0: 8}, "nothing that comes")
        run_on(link, problem.gradients[0], gossip, **arguments(problem))

    with pytest.raises(PeerLost, match=r"lost member 1 during gossip 0 of members 0 and 1: no answer within 30"):
        thinwire.run(2, member, Network(patience_s=30.0))


def test_a_gradient_that_diverges():
    problem, gossip = ridge(2), uniform(path(2))
    with pytest.raises(DivergedError, match="not finite"):
        thinwire.run(2, lambda link: run_on(link, lambda x: x + torch.nan, gossip, **arguments(problem)))


def test_more_members_than_nodes():
    problem = ridge(2)
    with pytest.raises(ConfigError, match=r"(?s)3 members on a graph of 2 nodes.*one member a node"):
        thinwire.run(3, lambda link: run_on(link, problem.gradients[0], uniform(path(2)), **arguments(problem)))


# --- real threads, real sockets ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_give_the_bits_of_virtual_time(tmp_path):
    """One group for all of it: as quick as it goes, on the wall's clock, and with clocks of another seed."""
    problem, gossip = ridge(3, seed=5), uniform(ring(3))
    expected = simulate(problem.gradients, gossip, **arguments(problem, seed=6)).nodes
    real, _ = members("everything", tmp_path, 3, program="decentralized/node.py")
    assert same([result["quick"] for result in real], expected)
    assert same([result["paced"] for result in real], expected)
    assert same(thinwire.run(3, part), expected)
    kinds = [result["other seed"] for result in real]
    assert kinds[1] == "PacketError"
    assert set(kinds) <= {"PacketError", "PeerLost"}, "and nobody hangs"
