"""A stand-in for the log's record of a round."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from thinwire.errors import PacketError


@dataclass(frozen=True)
class Closed:
    """A round that was closed."""

    number: int
    lr: float
    codes: Mapping[int, bytes]
    joined: tuple[int, ...] = ()
    left: tuple[int, ...] = ()

    def to_bytes(self) -> bytes:
        codes = {str(member): code.hex() for member, code in self.codes.items()}
        return json.dumps([self.number, self.lr, codes, self.joined, self.left]).encode()

    @staticmethod
    def from_bytes(raw: bytes) -> Closed:
        try:
            number, lr, codes, joined, left = json.loads(raw)
        except ValueError as error:
            raise PacketError("no record of a round") from error
        told = {int(member): bytes.fromhex(code) for member, code in codes.items()}
        return Closed(number, lr, told, tuple(joined), tuple(left))
