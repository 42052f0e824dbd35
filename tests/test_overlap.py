"""Nothing waits that need not: who waits for whom, and for how long, in exact simulated time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import thinwire
from small import adamw, local_steps, make_model
from thinwire import Network, streaming_diloco
from thinwire.codecs import int8
from thinwire.collectives import Carried, combine
from thinwire.graphs import Exponential, Ring
from thinwire.links.local import run
from thinwire.method import Method
from thinwire.outer import SGD, Average
from thinwire.payloads import Delta, Parameters
from thinwire.rounds import Terms, opened
from thinwire.schedules import Every
from thinwire.topologies import Everyone, Islands, RandomPairs

N = 2000  # elements: 8 kB, which takes 64 ms at 1 Mbit/s and 6.4 s at 10 kbit/s
FAST, SLOW = 1e6, 1e4


def rounds_of(link, method, count, *, beside=False):
    """When each round ended on a member, and with whom it was; beside the next step, or before it.  [count]"""
    how, told, last = method.codec.fit(((N,),)), [], None

    def end(handle):
        ranks = handle.wait().ranks
        told.append((link.now(), ranks))

    for number in range(count):
        link.local_step()
        if last is not None:
            end(last)
        exchange = opened(method, Terms(0, 0), link, 0, number, how)
        last = link.spawn(lambda exchange=exchange: combine(exchange, torch.ones(N), 1.0, Carried(), None), "a round")
        if not beside:
            end(last)
            last = None
    if last is not None:
        end(last)
    return told


def waiters(told, first):
    """Members that had, up to each round, to wait for `first` or for somebody who had: [rounds] of sets."""
    touched, after = {first}, []
    for number in range(len(told[0])):
        touched = touched | {rank for rank, rounds in enumerate(told) if touched & set(rounds[number][1])}
        after.append(touched)
    return after


GOSSIP = {
    "pairs": (RandomPairs(), 12),
    "islands of two in pairs": (Islands(2, between=RandomPairs()), 16),
    "ring": (Ring(), 9),
    "one peer on an exponential graph": (Exponential(), 16),
}
HINDRANCES = {
    "a slow way up": lambda network, members: replace(network, up_bits_per_s=[SLOW] + [FAST] * (members - 1)),
    "a slow way down": lambda network, members: replace(network, down_bits_per_s=[SLOW] + [FAST] * (members - 1)),
    "slow steps": lambda network, members: replace(network, step_s=[10.0] + [1.0] * (members - 1)),
    "a long way": lambda network, members: replace(network, latency_s=[60.0] + [0.0] * (members - 1)),
}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("hindrance", HINDRANCES)
@pytest.mark.parametrize("name", GOSSIP)
def test_only_those_who_meet_a_slow_member_wait_for_it(name, hindrance, beside):
    """The others' rounds end when they would have ended without it, to the bit of the clock."""
    topology, members = GOSSIP[name]
    method = Method(payload=Parameters(), outer=Average(), topology=topology)
    even = Network(FAST, FAST, step_s=1.0)
    odd = HINDRANCES[hindrance](even, members)
    usual, hindered = (run(members, lambda link: rounds_of(link, method, 3, beside=beside), net) for net in (even, odd))
    met = waiters(hindered, 0)
    assert {0} < met[0] < met[1] <= set(range(members)), "some wait at once, others not yet"
    for number, touched in enumerate(met):
        for rank in range(members):
            late = hindered[rank][number][0] - usual[rank][number][0]
            assert late == 0 if rank not in touched else late >= 0, f"member {rank} in round {number}"
    assert any(hindered[rank][-1][0] > usual[rank][-1][0] + 1 for rank in met[0]), "it is a hindrance"


def test_everybody_waits_for_a_slow_member_where_all_combine():
    """The control: what the test above would see if a round's verdict were everybody's."""
    method = Method(payload=Parameters(), outer=Average(), topology=Everyone())
    even = Network(FAST, FAST, step_s=1.0)
    odd = HINDRANCES["a slow way up"](even, 4)
    usual, hindered = (run(4, lambda link: rounds_of(link, method, 1), net) for net in (even, odd))
    assert all(late[0][0] > soon[0][0] + 1 for late, soon in zip(hindered, usual, strict=True))


def trained(link, method, steps):
    """Seconds at the end of the last step, and where the time went."""
    model = make_model()
    optimizer = adamw(model)
    with thinwire.synchronize(model, optimizer, method, link) as sync:
        start = link.now()
        local_steps(model, optimizer, link.rank, range(steps))
        return link.now() - start, sync.timing


@pytest.mark.parametrize("fragments", [1, 3])
def test_rounds_that_fit_beside_the_steps_cost_no_time(fragments):
    """Three members, 15 steps of 1 s, rounds of some ms: the time is that of a network without limits, to the bit."""
    method = streaming_diloco(every=5, fragments=fragments, overlap=2, codec=int8())
    limited = run(3, lambda link: trained(link, method, 15), Network(1e6, 1e6, latency_s=0.01, step_s=1.0))
    free = run(3, lambda link: trained(link, method, 15), Network(step_s=1.0))
    for (seconds, timing), (unlimited, _) in zip(limited, free, strict=True):
        assert seconds == pytest.approx(unlimited, abs=1e-9), "differences of sums that begin at another time"
        assert timing.wait_s == timing.encode_s == 0
        assert timing.hidden_s > 0.02


def test_what_does_not_fit_beside_the_steps_is_exposed():
    """The same rounds with nothing beside them: every second that was hidden is waited for."""
    network = Network(1e6, 1e6, latency_s=0.01, step_s=1.0)
    beside = Method(schedule=Every(5, overlap=2), payload=Delta(), outer=SGD(1.0))
    blocking = beside.but(schedule=Every(5))
    hidden = run(3, lambda link: trained(link, beside, 13)[1], network)
    exposed = run(3, lambda link: trained(link, blocking, 13)[1], network)
    for beside_it, before_it in zip(hidden, exposed, strict=True):
        assert beside_it.wait_s == before_it.hidden_s == 0
        # Members leave the handshake up to 1 ms apart; blocking rounds make that good once, hidden ones do not.
        assert before_it.wait_s == pytest.approx(beside_it.hidden_s, abs=2e-3)
        assert before_it.wait_s > 0.1


def test_a_slow_pair_does_not_hold_up_a_fast_one_on_the_same_member():
    """Two rounds under way on member 1: with 0, whose way up is slow, and with 2."""

    def member(link):
        channels = [link.open("slow"), link.open("fast")]
        partner = {(0, 0): 1, (1, 0): 0, (1, 1): 2, (2, 1): 1}
        message = torch.zeros(1000, dtype=torch.uint8)

        def job(channel, other):
            channel.exchange({other: message}, {other: 1000}, "a round")
            return link.now()

        jobs = {
            number: link.spawn(lambda number=number, other=other: job(channels[number], other), "a round")
            for (rank, number), other in partner.items()
            if rank == link.rank
        }
        return {number: handle.wait() for number, handle in sorted(jobs.items(), reverse=True)}

    times = run(3, member, Network(up_bits_per_s=[800, 8e6, 8e6], down_bits_per_s=8e6))
    assert times == [{0: 0.001}, {1: 0.002, 0: 10.0}, {1: 0.002}]
