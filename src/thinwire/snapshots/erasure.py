"""Reed-Solomon erasure coding of a state: n shards, of which any k give it back bit for bit.

    shard j < k    bytes [j L, (j + 1) L) of the state, zeros behind its end       L = ceil(size / k)
    shard j >= k   sum over i < k of C[j][i] * shard i, byte by byte in GF(256)

Error   none while n - k shards or fewer are lost. What is damaged is found by its digest and counts as lost: a code of
        erasures would not notice it, and would spread it.
Size    n/k of the state. Of it n - k shards are new memory; the k others are the state itself, never copied here.
Cost    (n - k) k products for k bytes, and SHA-256 over all shards.
Source  Rizzo 1997, Effective Erasure Codes for Reliable Computer Communication Protocols: the matrix of `zfec`, which
        computes it, block after block.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinwire.errors import ConfigError, PacketError

Bytes = NDArray[np.uint8]
#: Of a shard, coded at once: n blocks lie in a core's cache together.
BLOCK_BYTES = 64 << 10
_MOST_SHARDS = 256  # elements of the field


@dataclass(frozen=True)
class Code:
    """Which code: (6, 4) writes six shards, and every four of them suffice."""

    shards: int = 6  # n
    needed: int = 4  # k

    def __post_init__(self) -> None:
        if not 1 <= self.needed < self.shards <= _MOST_SHARDS:
            raise ConfigError(
                f"a code of {self.shards} shards of which {self.needed} are needed",
                expected=f"1 <= needed < shards <= {_MOST_SHARDS}",
                mend="write Code(6, 4), which bears every two losses",
            )

    def shard_bytes(self, size: int) -> int:
        """Bytes of each shard of a state of so many bytes."""
        return -(-size // self.needed)


@dataclass(frozen=True)
class Manifest:
    """What all shards of one snapshot have in common; it goes with each of them.

    version  number of the snapshot among its owner's, ascending
    size     bytes of the state
    digests  SHA-256 of every shard, in hexadecimal: two snapshots with one manifest hold the same bytes
    """

    version: int
    size: int
    code: Code
    digests: tuple[str, ...]

    def to_json(self) -> str:
        """As text."""
        return json.dumps([self.version, self.size, self.code.shards, self.code.needed, list(self.digests)])

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The inverse of `to_json`; PacketError for anything else."""
        try:
            version, size, shards, needed, digests = json.loads(text)
            code = Code(shards, needed)
            whole = all(type(number) is int and number >= 0 for number in (version, size, shards, needed))
            named = len(digests) == shards and all(type(each) is str and len(each) == 64 for each in digests)
            if not (whole and named):
                raise ValueError("numbers or digests that cannot be")
        except (ValueError, TypeError, RecursionError, ConfigError) as error:
            raise PacketError(f"not the manifest of a snapshot: {text[:60]!r}") from error
        return cls(version, size, code, tuple(digests))


def encode(state: Bytes, code: Code, version: int) -> tuple[Manifest, list[Bytes]]:
    """The shards of a state.

    state    uint8 [size]; not to be changed while shards are in use: those below `needed` are views of it
    returns  the manifest, and n shards of uint8 [shard_bytes]; the last data shards are copies where the state ends
             within them
    """
    length = code.shard_bytes(len(state))
    shards = [_data_shard(state, i, length) for i in range(code.needed)]
    shards += [np.empty(length, np.uint8) for _ in range(code.shards - code.needed)]
    encoder = _zfec().Encoder(code.needed, code.shards)
    parity = tuple(range(code.needed, code.shards))
    for start, stop in _blocks(length):
        made = encoder.encode(tuple(shard[start:stop].data for shard in shards[: code.needed]), parity)
        for index, block in zip(parity, made, strict=True):
            shards[index][start:stop] = np.frombuffer(block, np.uint8)
    return Manifest(version, len(state), code, tuple(map(digest, shards))), shards


def recover(manifest: Manifest, shards: Mapping[int, Bytes]) -> Bytes:
    """The state, of whatever shards there are.

    shards   index -> uint8; damaged ones and those of other snapshots are found by the digest and not used
    returns  uint8 [size], memory of its own
    raises   ConfigError, naming what is missing and what is damaged, where fewer than `needed` are intact
    """
    code, length = manifest.code, manifest.code.shard_bytes(manifest.size)
    intact = {index for index, shard in shards.items() if is_intact(manifest, index, shard)}
    if len(intact) < code.needed:
        raise _too_few(manifest, intact, set(shards) - intact)
    state = np.empty(length * code.needed, np.uint8)
    rows = [state[i * length : (i + 1) * length] for i in range(code.needed)]
    lost = [i for i in range(code.needed) if i not in intact]
    for i in set(range(code.needed)) & intact:
        rows[i][:] = shards[i]
    if lost:
        # Data shards at their own place, others where one is lost: what zfec's decoder takes without moving any.
        others = iter(sorted(intact - set(range(code.needed))))
        numbers = tuple(i if i in intact else next(others) for i in range(code.needed))
        decoder = _zfec().Decoder(code.needed, code.shards)
        for start, stop in _blocks(length):
            made = decoder.decode(tuple(shards[number][start:stop].data for number in numbers), numbers)
            for i in lost:
                rows[i][start:stop] = np.frombuffer(made[i], np.uint8)
    for i in lost:
        assert digest(rows[i]) == manifest.digests[i], "a shard decoded from intact ones is what was encoded"
    return state[: manifest.size]


def is_intact(manifest: Manifest, index: int, shard: Bytes) -> bool:
    """Whether these bytes are that shard of that snapshot."""
    return 0 <= index < manifest.code.shards and digest(shard) == manifest.digests[index]


def digest(shard: Bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(shard).data).hexdigest()


def _data_shard(state: Bytes, index: int, length: int) -> Bytes:
    piece = state[index * length : (index + 1) * length]
    return piece if len(piece) == length else np.pad(piece, (0, length - len(piece)))


def _blocks(length: int) -> Sequence[tuple[int, int]]:
    return [(start, min(start + BLOCK_BYTES, length)) for start in range(0, length, BLOCK_BYTES)]


def _too_few(manifest: Manifest, intact: set[int], damaged: set[int]) -> ConfigError:
    missing = set(range(manifest.code.shards)) - intact - damaged
    found = f"snapshot {manifest.version} has {len(intact)} intact shards"
    return ConfigError(
        f"{found}; missing {sorted(missing) or 'none'}, damaged or of another snapshot {sorted(damaged) or 'none'}",
        expected=f"{manifest.code.needed} of its {manifest.code.shards}",
        mend="ask the other holders, take an older snapshot, or resume from a checkpoint on disk",
    )


def _zfec() -> Any:
    try:
        return importlib.import_module("zfec")
    except ImportError as error:
        raise ConfigError(
            f"erasure coding needs the package zfec ({error})",
            expected="the extra `snapshots`, which brings it (its licence is GPL 2 or later)",
            mend="pip install 'thinwire[snapshots]'",
        ) from error
