"""Looks, beside everything else, whether the others of a gathering are still heard, and ends it if one is not.

A process that dies resets its connections, but a cable that is pulled says nothing, nor does a reset that is lost on
the way: sockets stay open, and an exchange would wait to the end of its time limit, a minute and more. The lighthouse
hears every member's heart many times a second, and knows within seconds.
"""

from __future__ import annotations

import logging
import math
import threading

from thinwire.elastic.lighthouse import Lookout
from thinwire.links.torch import TorchLink

_log = logging.getLogger("thinwire")

_SILENT_BEATS = 3  # of the lighthouse's heartbeat time: by then it has left the member out itself


class Sentry:
    """From its making to `end`."""

    def __init__(self, address: str, others: tuple[str, ...], link: TorchLink, heartbeat_s: float) -> None:
        """
        address      of the lighthouse where the gathering met
        others       names of the gathering's other members
        link         over the gathering; cut if one of them is not heard for three times `heartbeat_s`
        heartbeat_s  seconds after which the lighthouse counts a member as gone
        """
        self._address, self._others, self._link = address, others, link
        self._heartbeat_s = heartbeat_s
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="sentry", daemon=True).start()

    def end(self) -> None:
        """The gathering has ended."""
        self._ended.set()

    def _watch(self) -> None:
        lookout, known = Lookout(self._address), set[str]()
        while not self._ended.wait(self._heartbeat_s / 2):
            heard = lookout.hearts()
            if heard is None:  # it is gone, or we are cut off from it: nothing is known of the others
                break
            # One that was started again has not heard those who beat for the old one: they are not silent, but unknown.
            known |= heard.keys()
            silent = [
                name
                for name in self._others
                if name in known and heard.get(name, math.inf) > _SILENT_BEATS * self._heartbeat_s
            ]
            if silent and not self._ended.is_set():
                _log.warning("%s not heard for %.0f s", ", ".join(silent), _SILENT_BEATS * self._heartbeat_s)
                self._link.cut(f"{', '.join(silent)} not heard at the lighthouse")
                break
        lookout.close()
