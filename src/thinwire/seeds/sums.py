"""K directions for good, and how far the model has gone along each: a fine-tune that does not grow with rounds.

    w = w_0 - sum_k (S_k / 2^bits) z(mix(seed, "pool", k))      S_k whole, of 64 bits; zeros skipped

Learning rates are in S already, so they may change from round to round; weight decay has no place here. Whole numbers
add up to the same in any order.

Size    4096 directions: 14 kB for sums of the size of 1e-6, whatever the number of rounds.
Source  Qin et al. 2024, arXiv:2312.06353 (FedKSeed).
Differs the sums there are floats and hold scalars without the learning rate; fixed point makes them free of order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from thinwire.errors import ConfigError
from thinwire.randomness import mix
from thinwire.seeds.codes import float32
from thinwire.seeds.updates import Update

_POOL = 0x706F6F6C  # purpose of a key: "pool"
_MOST = (1 << 63) - 1


@dataclass(frozen=True)
class Sums:
    """See above.

    seed    of the pool, 64 bits
    values  S_0, S_1, ..., S_(K-1)
    bits    of them behind the point: with 40, a step of 1e-7 is a number of 17 bits
    """

    seed: int
    values: tuple[int, ...]
    bits: int = 40

    def __post_init__(self) -> None:
        assert 0 <= self.seed < 1 << 64
        assert 0 <= self.bits < 64
        most = max(map(abs, self.values), default=0)
        if most > _MOST:
            raise ConfigError(
                f"a sum of {most} in a pool of directions",
                expected=f"at most {_MOST}: 64 bits, {self.bits} of them behind the point",
                mend="clip scalars before they are added up, or lower the learning rate",
            )

    def direction(self, k: int) -> int:
        """The seed of direction k."""
        return mix(self.seed, _POOL, k)

    def added(self, told: Mapping[int, int]) -> Sums:
        """With these added: direction -> whole number, as above."""
        values = list(self.values)
        for k, value in told.items():
            values[k] += value
        return replace(self, values=tuple(values))

    def update(self) -> Update:
        """From the base to the model."""
        moved = [(k, value) for k, value in enumerate(self.values) if value]
        scalars = tuple(float32(value / (1 << self.bits)) for _, value in moved)
        return Update(tuple(self.direction(k) for k, _ in moved), scalars)
