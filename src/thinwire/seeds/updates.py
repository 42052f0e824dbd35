"""What a round does to a model, as numbers: the value that logs are turned into and that replay takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Update:
    """w <- keep w - sum_i scalars[i] z(seeds[i]), for every tunable parameter w.

    seeds    of directions, 64 bits each
    scalars  learning rate and every division included; exactly representable in float32
    keep     what weight decay leaves of matrices, exactly representable in float32; parameters of fewer than two
             dimensions (biases, norms) are not decayed
    round    keys the rounding of half-precision parameters
    """

    seeds: tuple[int, ...]
    scalars: tuple[float, ...]
    keep: float = 1.0
    round: int = 0
