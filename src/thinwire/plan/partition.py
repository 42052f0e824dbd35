"""Partitioning of a model's state to tiers of links: chips of a package, packages of a node, nodes of a site.

    memory = w P / g_w + g P / g_g + o P / g_o                               bytes on a device
    time   = 2 gather(w P, g_w)                                              weights, forward and backward
           + scatter(g P, g_g) + 2 gather(g P / g_g, N / g_g)                gradients: reduce-scatter, all-reduce
           + gather(w P / g_w, g_o / g_w)                                    new weights, from whoever stepped them
    gather(B, g) = scatter(B, g) = B (g - 1) / g / rate of the slowest tier that the group spans

P parameters, N devices, w, g, o bytes of a parameter's weight, gradient and optimizer state. g_w <= g_g <= g_o are the
members that share weights, gradients and optimizer state, each a product of inner tiers: frequent gathers stay within
the fastest. All choices are tried; there are few.

Engines fsdp2   what fully_shard does: gradients and optimizer state alike (g_g = g_o), replicated beyond them; weights
                whole after the forward pass (g_w = 1), sharded again (g_w = g_o), or over some (1 < g_w < g_o). In the
                last case the first gather is over all g_o at once: as many bytes, more of them on the outer tier
        zero    DistributedDataParallel with ZeroRedundancyOptimizer: g_w = g_g = 1, g_o = N
        ideal   every choice, in two levels: what an engine made for it could do
Source  Xu et al. 2025, arXiv:2501.04266 has three such levels, by its abstract. The formulas are ours, from the volumes
        of ring collectives; what torch's engines ask for is counted in tests/islands.
Differs the all-reduce is over all N / g_g holders of a gradient's shard, not over g_o / g_g: with g_o < N replicas
        would drift apart. What ZeroRedundancyOptimizer sends is one half more than ZeRO's first stage in theory: it
        sums gradients everywhere, where a reduce-scatter would do. FSDP2 gathers from the optimizer's own weights and
        keeps no shard in the narrow type: where weights are sharded it needs w P / g_w less than planned.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from thinwire.errors import ConfigError
from thinwire.topologies import Everyone, Islands, Topology

_APART = 2.0  # tiers whose rates differ by less are one: a level costs a turn of waiting


@dataclass(frozen=True)
class Tier:
    """A level of machines, from the inside out: so many of the level below, and what each device sends at this one."""

    name: str
    size: int
    rate_bits_per_s: float

    def __post_init__(self) -> None:
        if self.size < 1 or not self.rate_bits_per_s > 0:
            raise ConfigError(
                f"tier {self.name!r} of {self.size} at {self.rate_bits_per_s:g} bit/s",
                expected="at least one, and a rate above 0",
                mend="name what was measured: `thinwire doctor` measures a link",
            )


@dataclass(frozen=True)
class Costs:
    """Bytes of a parameter. The default is bfloat16 with Adam: float32 weights and two moments in the optimizer."""

    weight_bytes: int = 2
    gradient_bytes: int = 2
    optimizer_bytes: int = 12


@dataclass(frozen=True)
class Partition:
    """A choice and what it comes to, for one device and step.

    weights, gradients, optimizer  members that share each: g_w, g_g, g_o
    sent_bytes                     by name of the outermost tier that a collective spans
    """

    engine: str
    weights: int
    gradients: int
    optimizer: int
    devices: int
    memory_bytes: float
    time_s: float
    sent_bytes: Mapping[str, float] = field(default_factory=dict)

    @property
    def mesh(self) -> tuple[int, ...]:
        """Shape for init_device_mesh: replicas, if there are any, and then shards."""
        replicas = self.devices // self.optimizer
        return (self.optimizer,) if replicas == 1 else (replicas, self.optimizer)

    @property
    def reshard_after_forward(self) -> bool | int:
        """What to give to fully_shard."""
        if self.engine != "fsdp2":
            raise ConfigError(
                f"a partition for {self.engine}",
                expected="one for fsdp2: only fully_shard takes this",
                mend='ask for partition(..., engines=("fsdp2",))',
            )
        if self.weights in (1, self.optimizer):
            return self.weights == self.optimizer
        return self.weights


@dataclass(frozen=True)
class _Collective:
    """`times` a gather or its mirror of `total_bytes` among `outer / inner` devices, `inner` apart."""

    times: int
    total_bytes: float
    inner: int
    outer: int

    @property
    def sent_bytes(self) -> float:
        """By each device."""
        group = self.outer // self.inner
        return self.times * self.total_bytes * (group - 1) / group


#: An engine's choices: (g_w, g_g, g_o) and what is carried out in a step.
_Choices = Iterator[tuple[tuple[int, int, int], list[_Collective]]]


def partition(
    tiers: Sequence[Tier], parameters: int, memory_bytes: float, *, costs: Costs = Costs(),
    engines: Sequence[str] = ("fsdp2", "zero"),
) -> Partition:  # fmt: skip
    """The fastest partition that fits.

    tiers         from the inside out: tiers[0] joins the closest devices
    memory_bytes  of a device, for weights, gradients and optimizer state: activations and buffers come on top
    engines       which may be used: "fsdp2", "zero", "ideal"
    raises        ConfigError if nothing fits
    """
    unknown = set(engines) - set(ENGINES)
    if unknown or not engines or not tiers:
        raise ConfigError(
            f"engine {min(unknown)!r}" if unknown else "no engine" if not engines else "no tier",
            expected=f"one or more of {', '.join(ENGINES)}, and one tier or more",
            mend="leave engines out, and name the tiers from the inside out",
        )
    found = [
        _priced(engine, groups, carried, tiers, parameters, costs)
        for engine in engines
        for groups, carried in ENGINES[engine](_groups(tiers), parameters, costs)
    ]
    fitting = [each for each in found if each.memory_bytes <= memory_bytes]
    if not fitting:
        least = min(found, key=lambda each: each.memory_bytes)
        raise ConfigError(
            f"{parameters} parameters in {memory_bytes:g} bytes on each of {least.devices} devices",
            expected=f"{least.memory_bytes:g} bytes, which the state takes when everything is sharded",
            mend="more devices, a smaller model, or narrower state: Costs(optimizer_bytes=6)",
        )
    return min(fitting, key=lambda each: (each.time_s, each.memory_bytes))


def islands(tiers: Sequence[Tier]) -> Topology:
    """Members in islands of islands that match the tiers, for a method's `topology`; those of one rate are one tier.

    >>> islands([Tier("package", 2, 1e12), Tier("node", 4, 1e11), Tier("site", 8, 1e9)])
    Islands(size=2, between=Islands(size=4, between=Everyone(shares=()), inside=FP32()), inside=FP32())
    """
    levels: list[Tier] = []
    for tier in tiers:
        if levels and levels[-1].rate_bits_per_s < _APART * tier.rate_bits_per_s:
            inner = levels.pop()
            rate = min(inner.rate_bits_per_s, tier.rate_bits_per_s)
            levels.append(Tier(f"{inner.name}, {tier.name}", inner.size * tier.size, rate))
        elif tier.size > 1:
            levels.append(tier)
    topology: Topology = Everyone()
    for tier in reversed(levels[:-1]):
        topology = Islands(tier.size, between=topology)
    return topology


def _groups(tiers: Sequence[Tier]) -> list[int]:
    """Sizes of groups that end with a tier, from 1 device to all."""
    return sorted(set(itertools.accumulate((tier.size for tier in tiers), operator.mul, initial=1)))


def _fsdp2(groups: list[int], parameters: int, costs: Costs) -> _Choices:
    devices, weights = groups[-1], costs.weight_bytes * parameters
    for shared in groups:
        for kept in (group for group in groups if group <= shared):
            yield (
                (kept, shared, shared),
                [
                    _Collective(1, weights, 1, shared),
                    _Collective(1, weights, 1, kept),  # for the backward pass; of one, nothing
                    *_reduced(costs.gradient_bytes * parameters, shared, devices),
                ],
            )


def _zero(groups: list[int], parameters: int, costs: Costs) -> _Choices:
    devices = groups[-1]
    stepped = _Collective(1, costs.weight_bytes * parameters, 1, devices)
    yield (1, 1, devices), [*_reduced(costs.gradient_bytes * parameters, 1, devices), stepped]


def _ideal(groups: list[int], parameters: int, costs: Costs) -> _Choices:
    devices, weights = groups[-1], costs.weight_bytes * parameters
    for kept, reduced, stepped in itertools.combinations_with_replacement(groups, 3):
        yield (
            (kept, reduced, stepped),
            [
                _Collective(2, weights, 1, kept),
                *_reduced(costs.gradient_bytes * parameters, reduced, devices),
                _Collective(1, weights / kept, kept, stepped),
            ],
        )


def _reduced(total_bytes: float, group: int, devices: int) -> list[_Collective]:
    """Gradients summed over all devices, of which each keeps one shard in `group`."""
    return [_Collective(1, total_bytes, 1, group), _Collective(2, total_bytes / group, group, devices)]


#: Who carries a partition out.
ENGINES: Mapping[str, Callable[[list[int], int, Costs], _Choices]] = {"fsdp2": _fsdp2, "zero": _zero, "ideal": _ideal}


def _priced(
    engine: str, groups: tuple[int, int, int], carried: list[_Collective], tiers: Sequence[Tier], parameters: int,
    costs: Costs,
) -> Partition:  # fmt: skip
    kept, reduced, stepped = groups
    memory = parameters * (costs.weight_bytes / kept + costs.gradient_bytes / reduced + costs.optimizer_bytes / stepped)
    sent, time_s = {tier.name: 0.0 for tier in tiers}, 0.0
    for collective in carried:
        spanned = _spanned(tiers, collective.inner, collective.outer)
        if spanned:
            sent[spanned[-1].name] += collective.sent_bytes
            time_s += 8 * collective.sent_bytes / min(tier.rate_bits_per_s for tier in spanned)
    devices = math.prod(tier.size for tier in tiers)
    return Partition(engine, kept, reduced, stepped, devices, memory, time_s, sent)


def _spanned(tiers: Sequence[Tier], inner: int, outer: int) -> list[Tier]:
    """Tiers that a group of devices `inner` apart, within `outer`, has links of."""
    ends = list(itertools.accumulate((tier.size for tier in tiers), operator.mul))
    return [tier for tier, end in zip(tiers, ends, strict=True) if tier.size > 1 and inner < end <= outer]
