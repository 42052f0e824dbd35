"""What is used of torchft's Manager, and what is not."""

import os
from dataclasses import dataclass
from datetime import timedelta

import pytest

pytest.importorskip("torchft", reason="torchft is not installed: pip install 'thinwire[elastic]'")

import thinwire
from thinwire.elastic.asking import Asker, NoHealing
from thinwire.elastic.link import ElasticLink


def test_torchft_hands_over_no_state():
    """Its own transports unpickle what a peer sends."""
    transport = NoHealing()
    assert transport.metadata() == ""
    with pytest.raises(AssertionError, match="torchft was to send a state"):
        transport.send_checkpoint([1], 0, {}, timedelta(seconds=1))
    with pytest.raises(AssertionError, match="torchft was to take a state"):
        transport.recv_checkpoint(0, "", 0, timedelta(seconds=1))


@dataclass
class Answer:
    """torchft's, with a quorum id that means nothing."""

    max_step: int
    replica_ids: list[str]
    quorum_id: int = 1
    replica_rank: int = 0
    replica_world_size: int = 2
    store_address: str = "127.0.0.1:1"


class Client:
    def __init__(self, answer):
        self._quorum = lambda **asked: answer


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (Answer(4, ["a", "b"]), 4),
        (Answer(5, ["a", "b"]), 6),  # somebody says it is broken
        (Answer(4, ["a", "c"]), 5),  # other members under the same quorum id, as after a lighthouse's restart
        (Answer(4, ["b", "a"]), 5),  # ranks changed
    ],
)
def test_a_gathering_holds_if_number_and_names_are_its_own(answer, number):
    asker = Asker.__new__(Asker)
    asker._client = Client(answer)
    asker._holds = lambda number, names: (number, names) == (4, ("a", "b"))
    quorum = asker._quorum()
    assert (quorum.quorum_id, asker._held) == (number, number == 4)
    assert asker.names == tuple(answer.replica_ids)
    assert not quorum.heal


def test_join_elastic_is_a_link_that_nobody_else_is_in_yet():
    with thinwire.join_elastic("127.0.0.1:1", name="me", founds=False) as link:
        assert isinstance(link, ElasticLink)
        assert link.name.startswith(f"me-{os.getpid()}-")
        assert link.names == (link.name,)
        assert not link.founds
