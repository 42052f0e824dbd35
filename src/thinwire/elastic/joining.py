"""Joining a run whose members come and go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from thinwire.elastic.link import ElasticLink
from thinwire.elastic.settings import Limits
from thinwire.elastic.shelf import Shelf
from thinwire.elastic.torchft_meeting import TorchftMeeting


@contextmanager
def join_elastic(
    addresses: str | Sequence[str],
    *,
    name: str | None = None,
    host: str | None = None,
    at_least: int = 1,
    founds: bool = True,
    timeout_s: float | None = None,
    limits: Limits | None = None,
    standby_port: int = 0,
    shelf: Shelf | None = None,
) -> Iterator[ElasticLink]:
    """Take part in an elastic run for as long as the `with` block lasts; others may come and go meanwhile.

        with thinwire.join_elastic("10.0.0.1:29510") as link:
            with thinwire.synchronize(model, optimizer, method, link) as sync:
                while sync.step < steps:

    addresses     "HOST:PORT" of the run's lighthouse (`python -m thinwire.elastic.lighthouse`), or several in order
                  of trial: the lighthouse and members' standby ones
    name          begins this member's name, which is unlike any other's, ever; by default the machine's
    host          this machine's address as the others see it; by default the one that leads to the lighthouse
    at_least      members without whom no round is made
    founds        whether it may begin a run. One that comes to a run that goes on should not
    timeout_s     one override for every time limit of an exchange; by default they follow from what was measured
    limits        heartbeat and time limits of membership; what can be measured in them is
    standby_port  of this member's own standby lighthouse; 0 takes a free one
    shelf         pieces of the run's state that were fetched beside it (fetching.py): they are not sent again
    raises        ConfigError for a request that cannot be met, or if torchft is not installed
    """
    link = ElasticLink(
        TorchftMeeting(
            addresses, name=name, host=host, at_least=at_least, founds=founds, timeout_s=timeout_s, limits=limits,
            standby_port=standby_port,
        ),
        shelf=shelf, founds=founds,
    )  # fmt: skip
    try:
        yield link
    finally:
        link.close()
