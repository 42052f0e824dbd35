"""SPSA with gradient correction: tunes a vector before a model that only answers queries.

    c_k = c / k^gamma,   a_k = a / (k + offset)^alpha,   d_i = +-U[1/2, 1)                        k = 1, 2, ...
    g <- mean of (L(x + c_k d) - L(x - c_k d)) / (2 c_k d), element by element, over probes and members
    m <- beta m + g,   x <- x - a_k (g + beta m)

    tuner = QueryTuner(torch.zeros(n), SPSA(), link)
    for images, labels in data:
        tuner.step(lambda x: cost(service.scores(images + prompt(x)), labels))

Directions follow from a seed, the step, the member and the probe: members tell each other one number a probe, and all
hold the same vector, to the bit. A query that fails or whose loss is not finite takes its probe out of the mean.

Error   E g = grad L where L is linear, and without a term of second order in c; an element's error is as large as all
        other elements' gradients together: keep n at about 1e4. A service that rounds to steps of r adds r / c_k.
Size    (N-1) (4 bytes a probe + 8 + 92 of the frame) sent a member and step, whatever n
State   x and m, alike on all members
Cost    2 queries a probe; 3 passes over n numbers for every probe of every member
Source  Oh et al. 2023, arXiv:2303.14773 (BlackVIP); a, c, alpha, gamma, offset and 5 probes are those of its published
        code. Spall 1992 (SPSA).
Differs probes that failed are left out. a_k and c_k are those of the lowest member, as powers may differ in the last
        bit between machines. A magnitude is one of 2^23 numbers in [1/2, 1), exact in float32.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from thinwire.codecs.options import check_number, is_whole
from thinwire.collectives import gather_packets
from thinwire.errors import ConfigError, DivergedError
from thinwire.handshake import agree
from thinwire.links.base import Link
from thinwire.links.local import alone
from thinwire.packet import Header, Packet
from thinwire.packing import raw
from thinwire.randomness import mix, random_bytes
from thinwire.seeds.codes import float32
from thinwire.version import __version__

_log = logging.getLogger("thinwire")

_PURPOSE = 0x71756572  # of a key: "quer"

#: A loss at parameters [n]: an answer of the service, made into a number. May raise.
Query = Callable[[Tensor], float]


@dataclass(frozen=True, kw_only=True)
class SPSA:
    """What members agree on.

    rate    a: of a step; its decay with steps: alpha, from `offset` on
    width   c: how far from the parameters is asked; its decay: gamma
    beta    of the momentum
    probes  directions of a member in a step; two queries each
    seed    of all directions
    """

    rate: float = 0.01
    width: float = 0.01
    alpha: float = 0.4
    gamma: float = 0.1
    offset: float = 1.0
    beta: float = 0.9
    probes: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        mend = "SPSA() has the values of the paper's code"
        for name, bounds in {"rate": {"above": 0.0}, "width": {"above": 0.0}, "alpha": {"at_least": 0.0},
                             "gamma": {"at_least": 0.0}, "offset": {"at_least": 0.0},
                             "beta": {"at_least": 0.0, "below": 1.0}}.items():  # fmt: skip
            check_number("SPSA", f"with {name}", getattr(self, name), mend=mend, **bounds)
        for name, least in (("probes", 1), ("seed", 0)):
            if not is_whole(getattr(self, name), least):
                told = f"SPSA with {name} {getattr(self, name)!r}"
                raise ConfigError(told, expected=f"a whole number of at least {least}", mend=mend)

    def gains(self, number: int) -> tuple[float, float]:
        """a_k and c_k of step `number`, which counts from 0: k = number + 1. Exact in float32."""
        k = number + 1
        return float32(self.rate / (k + self.offset) ** self.alpha), float32(self.width / k**self.gamma)

    def direction(self, n: int, number: int, member: int, probe: int) -> Tensor:
        """d.  float32 [n] on the CPU: of each word, the lowest bit is the sign and the next 23 are the magnitude"""
        words = random_bytes(mix(self.seed, _PURPOSE, number, member, probe), 4 * n).view(torch.int32)
        magnitude = (words.bitwise_right_shift(1) & 0x7FFFFF).float().mul_(2.0**-24).add_(0.5)
        return magnitude.mul_((words & 1).mul_(-2).add_(1))


@dataclass(frozen=True)
class Probed:
    """A step, as all members have it.

    number       from 0
    rate, width  a_k and c_k
    differences  member -> L(x + c_k d) - L(x - c_k d) of each of its probes; NaN for those that failed
    """

    number: int
    rate: float
    width: float
    differences: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    @property
    def counted(self) -> int:
        """Probes that count."""
        return sum(math.isfinite(each) for told in self.differences.values() for each in told)


def advance(x: Tensor, m: Tensor, spsa: SPSA, probed: Probed) -> tuple[Tensor, Tensor]:
    """The next parameters and momentum, each float32 [n]; those given where no probe counts.

    Every product and sum is rounded on its own, members and probes in ascending order: the same bits everywhere.
    """
    if not probed.counted:
        return x, m
    g = torch.zeros_like(x)
    for member, told in sorted(probed.differences.items()):
        for probe, difference in enumerate(told):
            if math.isfinite(difference):
                slope = float32(difference / (2 * probed.width))
                g += torch.full_like(x, slope).div_(spsa.direction(len(x), probed.number, member, probe))
    g /= probed.counted
    beta = float32(spsa.beta)
    m = (m * beta).add_(g)
    return x - (m * beta).add_(g).mul_(probed.rate), m


def replay(x: Tensor, spsa: SPSA, steps: Sequence[Probed]) -> Tensor:
    """What the parameters [n] become by these steps, the first of which began with no momentum."""
    m = torch.zeros_like(x)
    for probed in steps:
        x, m = advance(x, m, spsa, probed)
    return x


class QueryTuner:
    """A member's part in tuning parameters before a service; use it as a context manager.

    parameters  float32 [n] on the CPU, where tuning begins: the same on all members. Of a module,
                torch.nn.utils.parameters_to_vector. Not changed: `tuner.parameters` is the vector as it is now
    spsa        the same on all members
    link        to the others; none for one member
    at_once     queries that may be under way together; from 2 on the loss is called from as many threads
    patience    steps in a row in which no probe of any member counts, before it is an error
    raises      ConfigError for parameters of another kind, and on entering if members differ

    `steps` has all that happened, for `replay`; `queries` counts this member's, failed ones too.
    """

    def __init__(
        self, parameters: Tensor, spsa: SPSA, link: Link | None = None, *, at_once: int = 1, patience: int = 5
    ) -> None:
        if parameters.dtype != torch.float32 or parameters.ndim != 1 or parameters.device.type != "cpu":
            raise ConfigError(
                f"parameters are {parameters.dtype} {list(parameters.shape)} on {parameters.device}",
                expected="a float32 vector on the CPU",
                mend="parameters.detach().float().cpu().reshape(-1)",
            )
        for name, value in (("at_once", at_once), ("patience", patience)):
            if not is_whole(value, 1):
                raise ConfigError(f"{name}={value!r}", expected="a whole number of at least 1", mend="leave it out")
        self.parameters, self._momentum = parameters.detach().clone(), torch.zeros(len(parameters))
        self._spsa, self._link, self._at_once, self._patience = spsa, link or alone(), at_once, patience
        self._channel, self._context, self._silent = self._link.open("queries"), 0, 0
        self.steps: list[Probed] = []
        self.queries = 0

    def __enter__(self) -> QueryTuner:
        held = hashlib.blake2b(raw(self.parameters), digest_size=8).hexdigest()
        facts = {"version": __version__, "spsa": repr(self._spsa), "steps": str(len(self.steps)), "parameters": held}
        self._context = agree(self._link, facts)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The link is the caller's to close."""

    def step(self, loss: Query) -> Probed:
        """One step: this member's queries, everybody's differences, everybody's move.

        loss    of parameters [n], a copy; asked twice a probe. Both answers must be about the same batch
        raises  PeerLost; DivergedError, from the last failure seen here, if no probe counted `patience` times in a row
        """
        number = len(self.steps)
        rate, width = self._spsa.gains(number)
        differences, failure = self._ask(loss, number, width)
        probed = self._gather(differences, number, rate, width)
        self.parameters, self._momentum = advance(self.parameters, self._momentum, self._spsa, probed)
        self.steps.append(probed)
        self._silent = 0 if probed.counted else self._silent + 1
        if self._silent >= self._patience:
            raise DivergedError(
                f"no query was answered with a finite loss for {self._silent} steps",
                expected="two finite losses for at least one probe of some member",
                mend="look at the service, its limits, and how its answers become a loss",
            ) from failure
        return probed

    def _ask(self, loss: Query, number: int, width: float) -> tuple[list[float], Exception | None]:
        """This member's differences, NaN for probes that failed, and the last failure."""
        spsa, x, rank = self._spsa, self.parameters, self._link.rank
        ways = [spsa.direction(len(x), number, rank, probe).mul_(width) for probe in range(spsa.probes)]
        places = [x + side * way for way in ways for side in (1, -1)]
        self.queries += len(places)
        if self._at_once == 1:
            answers = [_answer(loss, place) for place in places]
        else:
            with ThreadPoolExecutor(self._at_once, "thinwire-query") as pool:
                answers = list(pool.map(lambda place: _answer(loss, place), places))
        failures = [each for each in answers if isinstance(each, Exception)]
        for failure in failures:
            _log.warning("step %d: a query failed, its probe is left out: %r", number, failure)
        values = [math.nan if isinstance(each, Exception) else each for each in answers]
        differences = [plus - minus for plus, minus in zip(values[::2], values[1::2], strict=True)]
        return differences, failures[-1] if failures else None

    def _gather(self, differences: Sequence[float], number: int, rate: float, width: float) -> Probed:
        link = self._link
        link.local_step()
        fields = {"gains": torch.tensor([rate, width]), "difference": torch.tensor(differences)}
        header = Header(sender=link.rank, round=number, context=self._context)
        layout = {name: (value.dtype, len(value)) for name, value in fields.items()}
        packet = Packet("queries", len(differences), fields, header)
        found = gather_packets(self._channel, link.rank, link.members, packet, layout, f"answers of step {number}")
        rate, width = found[min(found)].fields["gains"].tolist()
        return Probed(number, rate, width, {rank: tuple(p.fields["difference"].tolist()) for rank, p in found.items()})

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Parameters, momentum and what happened."""
        steps = [(each.number, each.rate, each.width, dict(each.differences)) for each in self.steps]
        return {"parameters": self.parameters, "momentum": self._momentum, "steps": steps, "queries": self.queries}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, before the block."""
        self.parameters, self._momentum = state["parameters"].clone(), state["momentum"].clone()
        self.steps, self.queries = [Probed(*each) for each in state["steps"]], state["queries"]


def _answer(loss: Query, place: Tensor) -> float | Exception:
    try:
        return float(loss(place))
    except Exception as error:  # whatever a service's client raises: the step goes on without this probe
        return error
