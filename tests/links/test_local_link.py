"""The local link: a simulated network, exactly; members that do not see each other; faults as scripts."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from thinwire import ConfigError, Network, PeerLost
from thinwire.links.faulty import Tampered, flip
from thinwire.links.local import alone, run
from thinwire.links.meter import Traffic


def message(size: int, fill: int = 0) -> Tensor:
    return torch.full((size,), fill, dtype=torch.uint8)


def to_all(link, size: int = 10, purpose: str = "test") -> dict[int, Tensor]:
    """Everybody sends everybody its own rank."""
    others = [rank for rank in link.members if rank != link.rank]
    sent = dict.fromkeys(others, message(size, link.rank))
    return link.open(purpose).exchange(sent, dict.fromkeys(others, size), "a test")


# --- messages -------------------------------------------------------------------------------------------------


def test_everybody_gets_everybodys_message():
    for rank, arrived in enumerate(run(4, to_all)):
        assert {sender: buffer.tolist() for sender, buffer in arrived.items()} == {
            sender: [sender] * 10 for sender in range(4) if sender != rank
        }


def test_channels_and_turns_keep_messages_apart():
    """Channels are used in another order than they were opened, by jobs beside each other."""

    def member(link):
        other = 1 - link.rank
        first, second = link.open("a"), link.open("b")

        def talk(channel, base):
            return [channel.exchange({other: message(1, base + i)}, {other: 1}, "talk")[other].item() for i in range(3)]

        jobs = [(second, 20), (first, 10)] if link.rank else [(first, 10), (second, 20)]
        handles = [link.spawn(lambda channel=channel, base=base: talk(channel, base), "job") for channel, base in jobs]
        return sorted(handle.wait() for handle in handles)

    assert run(2, member) == [[[10, 11, 12], [20, 21, 22]]] * 2


def test_a_message_is_what_it_was_when_it_was_sent():
    def member(link):
        buffer, channel, other = message(4, 7), link.open("test"), 1 - link.rank
        if link.rank == 0:
            channel.exchange({other: buffer}, {}, "one way")
            buffer.zero_()
            return None
        return channel.exchange({}, {other: 4}, "one way")[other].tolist()

    assert run(2, member)[1] == [7] * 4


def test_every_byte_is_counted_by_purpose():
    def member(link):
        to_all(link, 10, "a")
        to_all(link, 5, "b")
        to_all(link, 1, "a")
        return link.meter.by_purpose(), link.meter.total()

    for ledger, total in run(3, member):
        assert ledger == {"a": Traffic(22, 22, 4), "b": Traffic(10, 10, 2)}
        assert total == Traffic(32, 32, 6)


def test_a_job_that_fails_says_so_to_whoever_waits_and_may_be_asked_again():
    def member(link):
        def job():
            raise KeyError("inside")

        handle, other = link.spawn(job, "bad"), link.spawn(lambda: 3, "good")
        told = []
        for _ in range(2):
            with pytest.raises(KeyError, match="inside"):
                handle.wait()
            told.append(other.wait())
        return told, handle.done(), other.done()

    assert run(2, member) == [([3, 3], True, True)] * 2


# --- time -----------------------------------------------------------------------------------------------------


def test_a_message_takes_latency_and_transmission():
    """1000 bytes at 8000 bit/s take 1 s; latency 0.5 s; both links alike: one pass, not two."""

    def member(link):
        to_all(link, 1000)
        return link.now()

    assert run(2, member, Network(up_bits_per_s=8000, down_bits_per_s=8000, latency_s=0.5)) == [1.5, 1.5]
    assert run(2, member, Network(up_bits_per_s=8000, latency_s=0.5)) == [1.5, 1.5]
    assert run(2, member, Network(down_bits_per_s=8000, latency_s=0.5)) == [1.5, 1.5]
    assert run(2, member, Network(up_bits_per_s=8000, down_bits_per_s=4000)) == [2.0, 2.0], "the thinner one counts"
    assert run(2, member, Network(latency_s=0.25)) == [0.25, 0.25]
    assert run(2, member) == [0.0, 0.0]


def test_messages_share_the_up_link_and_the_down_link():
    """Three members: each sends two messages of 1 s, one after the other, and receives two; lower ranks come first."""

    def member(link):
        to_all(link, 1000)
        return link.now()

    assert run(3, member, Network(up_bits_per_s=8000)) == [1.0, 2.0, 2.0]
    assert run(3, member, Network(down_bits_per_s=8000)) == [2.0, 2.0, 2.0]


def test_rates_are_each_members_own():
    """Member 0 sends to 1 and then to 2 at 1 s a message; nobody else's link is limited."""

    def member(link):
        channel = link.open("test")
        if link.rank == 0:
            channel.exchange({1: message(1000), 2: message(1000)}, {}, "out")
        else:
            channel.exchange({}, {0: 1000}, "in")
        return link.now()

    assert run(3, member, Network(up_bits_per_s=[8000, None, None])) == [0.0, 1.0, 2.0]
    assert run(3, member, Network(down_bits_per_s=[None, 8000, 2000])) == [0.0, 1.0, 4.0]


def one_way(link, ways):
    """Messages of 1000 bytes from sender to receiver, in order; when each receiver had each of its own."""
    channels, at = [link.open("test") for _ in ways], {}
    for channel, (sender, receiver) in zip(channels, ways, strict=True):
        if link.rank == sender:
            channel.exchange({receiver: message(1000)}, {}, "out")
    for channel, (sender, receiver) in zip(channels, ways, strict=True):
        if link.rank == receiver:
            channel.exchange({}, {sender: 1000}, "in")
            at[sender] = link.now()
    return at


def test_what_is_there_first_goes_down_first_whoever_was_asked_first():
    """Member 0 sends to 1 for a second, then to 2; what 1 sends to 2 is there meanwhile."""
    times = run(3, lambda link: one_way(link, [(0, 1), (1, 2), (0, 2)]), Network(8000, 8000))
    assert times == [{}, {0: 1.0}, {1: 1.0, 0: 2.0}]


def test_a_slow_sender_leaves_room_on_the_receivers_link():
    """Member 0 takes 10 s to send what member 2 could take in 1 s; what member 1 sends meanwhile is not held up."""
    network = Network(up_bits_per_s=[800, None, None], down_bits_per_s=8000)
    assert run(3, lambda link: one_way(link, [(1, 2), (0, 2)]), network)[2] == {1: 2.0, 0: 10.0}


def test_small_messages_pass_between_the_frames_of_large_ones():
    """A member sends 1000 bytes, then 100: 1 s and 0.1 s alone. The small one's time is the next large one's delay."""

    def member(link):
        large, small, last = (link.open("test") for _ in range(3))
        if link.rank == 0:
            large.exchange({1: message(1000)}, {}, "large")
            small.exchange({1: message(100)}, {}, "small")
            last.exchange({1: message(1000)}, {}, "large")
            return None
        times = []
        for channel in (small, large, last):
            channel.exchange({}, {0: 1000}, "in")
            times.append(link.now())
        return times

    assert run(2, member, Network(up_bits_per_s=8000))[1] == [0.1, 1.0, 2.1]
    assert run(2, member, Network(down_bits_per_s=8000))[1] == [0.1, 1.0, 2.1]
    several = run(2, lambda link: to_all(link, 10) and [to_all(link, 10), link.now()][1], Network(up_bits_per_s=800))
    assert several == [0.2, 0.2], "small ones queue behind each other"


def test_a_message_takes_the_mean_of_both_ends_latencies():
    times = run(3, lambda link: one_way(link, [(0, 1), (1, 2), (0, 2)]), Network(latency_s=[0.5, 1.5, 3.5]))
    assert times == [{}, {0: 1.0}, {1: 2.5, 0: 2.5}]


def test_jitter_is_log_normal_and_the_same_every_time():
    """Of 400 messages: the mean of the logarithms within 4 standard errors, their deviation within 4 of its own."""

    def member(link):
        channels = [link.open("test") for _ in range(400)]
        if link.rank == 0:
            for channel in channels:
                channel.exchange({1: message(1)}, {}, "out")
            return []
        jobs = [link.spawn(lambda each=each: (each.exchange({}, {0: 1}, "in"), link.now()), "in") for each in channels]
        return [job.wait()[1] for job in jobs]

    assert run(2, member, Network(latency_s=2.0))[1] == [2.0] * 400
    jittery = Network(latency_s=2.0, jitter=0.5)
    waits = run(2, member, jittery)[1]
    assert waits == run(2, member, jittery)[1]
    logarithms = np.log(np.array(waits) / 2.0)
    assert abs(logarithms.mean()) < 4 * 0.5 / 400**0.5
    assert abs(logarithms.std() - 0.5) < 4 * 0.5 / 800**0.5


def test_sending_costs_the_sender_no_time_but_its_link():
    def member(link):
        channel = link.open("test")
        if link.rank == 0:
            channel.exchange({1: message(1000)}, {}, "first")
            link.local_step()
            channel.exchange({1: message(1000)}, {}, "second")
            return link.now()
        times = []
        for what in ("first", "second"):
            channel.exchange({}, {0: 1000}, what)
            times.append(link.now())
        return times

    fast = Network(up_bits_per_s=8000, step_s=0.25)
    assert run(2, member, fast) == [0.25, [1.0, 2.0]], "the second waits for the up-link"
    slow = Network(up_bits_per_s=8000, step_s=3.0)
    assert run(2, member, slow) == [3.0, [1.0, 4.0]], "the second leaves when it is there"


def test_members_step_at_their_own_speed_and_the_slowest_is_waited_for():
    def member(link):
        for _ in range(2):
            link.local_step()
        before = link.now()
        to_all(link)
        return before, link.now()

    assert run(3, member, Network(step_s=[1.0, 2.5, 0.5])) == [(2.0, 5.0), (5.0, 5.0), (1.0, 5.0)]


def test_communication_runs_beside_the_compute():
    def member(link):
        channel, other = link.open("test"), 1 - link.rank
        handle = link.spawn(lambda: channel.exchange({other: message(1000)}, {other: 1000}, "beside"), "job")
        for _ in range(3):
            link.local_step()
        done_early, before = handle.done(), link.now()
        handle.wait()
        return done_early, before, link.now()

    network = Network(up_bits_per_s=8000, step_s=1.0)
    assert run(2, member, network) == [(True, 3.0, 3.0)] * 2
    network = Network(up_bits_per_s=1600, step_s=1.0)
    assert run(2, member, network) == [(False, 3.0, 5.0)] * 2


def test_the_member_with_the_smallest_time_goes_first():
    """Order of events by simulated time; equal times by the order of starting."""
    log: list[tuple[int, float]] = []

    def member(link):
        for _ in range(3):
            link.local_step()
            log.append((link.rank, link.now()))

    run(3, member, Network(step_s=[1.0, 0.4, 1.0]))
    assert [rank for rank, _ in log] == [1, 1, 0, 2, 1, 0, 2, 0, 2]
    assert [at for _, at in log] == sorted(at for _, at in log)
    first = list(log)
    log.clear()
    run(3, member, Network(step_s=[1.0, 0.4, 1.0]))
    assert log == first


# --- faults ---------------------------------------------------------------------------------------------------


def test_waiting_for_each_other_ends_when_patience_does():
    """Member 0 waits for 1, member 1 for 2, and 2 for 0, and nobody has sent."""

    def member(link):
        with pytest.raises(PeerLost) as lost:
            link.open("test").exchange({}, {(link.rank + 1) % 3: 8}, "round 3")
        return lost.value.ranks, str(lost.value), link.now()

    results = run(3, member, Network(patience_s=60))
    assert results[0][0] == (1,)
    assert "lost member 1 during round 3: no answer within 60 simulated seconds" in results[0][1]
    assert results[0][2] == 60.0


def test_who_waits_for_a_member_that_ended_learns_of_it_at_once():
    def member(link):
        if link.rank == 2:
            link.local_step()
            return None
        with pytest.raises(PeerLost, match="lost member 2 during a test: it ended") as lost:
            to_all(link)
        return lost.value.ranks, link.now()

    assert run(3, member, Network(step_s=5.0)) == [((2,), 5.0), ((2,), 5.0), None]


def test_what_was_sent_before_leaving_arrives():
    def member(link):
        channel = link.open("test")
        if link.rank == 0:
            channel.exchange({1: message(3, 9)}, {}, "parting")
            return None
        link.local_step()
        return channel.exchange({}, {0: 3}, "parting")[0].tolist()

    assert run(2, member, Network(step_s=1.0, latency_s=7.0))[1] == [9, 9, 9]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_the_original_error_is_raised_and_the_others_lose_a_peer(failing):
    seen = {}

    def member(link):
        if link.rank == failing:
            raise ZeroDivisionError("the first cause")
        try:
            to_all(link)
        except PeerLost as lost:
            seen[link.rank] = str(lost)
            raise

    with pytest.raises(ZeroDivisionError, match="the first cause"):
        run(3, member)
    assert set(seen) == {0, 1, 2} - {failing}
    for text in seen.values():
        assert f"lost member {failing} during a test: it failed with ZeroDivisionError" in text


def test_a_loss_of_peers_is_raised_when_it_is_all_there_is():
    with pytest.raises(PeerLost, match="lost member 1"):
        run(2, lambda link: to_all(link) if link.rank == 0 else None)


def test_tampered_changes_what_arrives_and_nothing_else():
    """A real link around the real one: the second message of member 1 for purpose "b", and only that."""
    log = []

    def change(purpose, sender, count, buffer):
        log.append((purpose, sender, count))
        return flip(buffer) if (purpose, sender, count) == ("b", 1, 1) else buffer

    def member(bare):
        link = Tampered(bare, change) if bare.rank == 0 else bare
        assert (link.rank, link.members, link.meter) == (bare.rank, bare.members, bare.meter)
        arrived = [to_all(link, 2, purpose) for purpose in ("b", "a", "b")]
        link.local_step()
        told = link.spawn(lambda: link.now(), "job").wait()
        link.close()
        return (
            [{sender: buffer.tolist() for sender, buffer in one.items()} for one in arrived],
            told,
            link.meter.total(),
        )

    results = run(3, member, Network(step_s=2.0))
    assert [one[1] for one in results[0][0]] == [[1, 1], [1, 1], [1, 1 ^ 0x10]]
    assert [one[2] for one in results[0][0]] == [[2, 2]] * 3
    assert [one[0] for one in results[1][0]] == [[0, 0]] * 3
    assert results[0][1] == results[1][1] == 2.0
    assert results[0][2] == results[1][2]
    assert log == [("b", 1, 0), ("b", 2, 0), ("a", 1, 0), ("a", 2, 0), ("b", 1, 1), ("b", 2, 1)]


# --- members in one process -------------------------------------------------------------------------------------


def _draws(link) -> list[object]:
    """Draws from every global generator, with the others' turns between them, and dropout."""
    out: list[object] = []
    dropout = nn.Dropout(0.5)
    for _ in range(3):
        out += [torch.rand(3).tolist(), random.random(), np.random.rand(), dropout(torch.ones(8)).tolist()]
        link.local_step()
        if len(link.members) > 1:
            to_all(link)
    return out


@pytest.mark.parametrize("seeded", [True, False])
def test_a_member_draws_as_if_it_were_alone(seeded):
    """Seeded inside or not: members are like processes that started from the caller's generators."""

    def member(link):
        if seeded:
            torch.manual_seed(link.rank % 2)
            random.seed(link.rank % 2)
            np.random.seed(link.rank % 2)
        return _draws(link)

    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    together = run(3, member)
    lonely = run(1, member)[0]
    assert together[0] == together[2] == lonely
    assert (together[1] == lonely) != seeded


def test_the_callers_generators_are_as_before():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    run(2, _draws)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()

    def fails(link):
        torch.rand(3)
        raise ValueError

    with pytest.raises(ValueError):
        run(2, fails)
    assert torch.equal(torch.get_rng_state(), before[0])


def test_jobs_do_not_disturb_a_members_draws():
    def member(link):
        torch.manual_seed(4)
        first = torch.rand(2).tolist()
        link.spawn(lambda: torch.rand(100).sum().item(), "job").wait()
        return first + torch.rand(2).tolist()

    torch.manual_seed(4)
    assert run(2, member) == [torch.rand(2).tolist() + torch.rand(2).tolist()] * 2


# --- a group of one ---------------------------------------------------------------------------------------------


def test_alone():
    link = alone()
    assert (link.rank, link.members) == (0, (0,))
    assert link.open("test").exchange({}, {}, "nothing") == {}
    ran = []
    handle = link.spawn(lambda: ran.append(1) or 5, "job")
    assert handle.wait() == handle.wait() == 5
    assert ran == [1]
    assert handle.done()
    assert link.now() <= link.now()
    link.local_step()
    link.close()
    link.close()
    assert link.meter.total() == Traffic()


def test_requests_that_make_no_sense():
    with pytest.raises(ConfigError, match=r"0 members\n.*at least one member"):
        run(0, lambda link: None)
    with pytest.raises(ConfigError, match=r"describes 2 members, there are 3\n.*\n.*give 3 values"):
        run(3, lambda link: None, Network(step_s=[1.0, 2.0]))


def test_no_thread_is_left_behind():
    """One that were still ending when the process does would abort it."""
    before = threading.active_count()
    for _ in range(5):
        run(3, lambda link: link.spawn(link.now, "a job").wait())
    assert threading.active_count() == before
