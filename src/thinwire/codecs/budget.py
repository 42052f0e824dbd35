"""Budget: every layer written with the option that is worth it there, at the total error of one setting for all.

    options o = 1..O, of one codec family or of several;   err_l,o = ||x_l - C_o(x_l)||^2, bytes_l,o as written

    save="bytes"   minimise sum_l bytes_l,o_l  subject to  sum_l err_l,o_l   <= limit * sum_l err_l,like
    save="error"   minimise sum_l err_l,o_l    subject to  sum_l bytes_l,o_l <= limit * sum_l bytes_l,like

Errors and bytes are measured on what is really written (with error feedback: on gradient plus residual) in `window`
rounds, averaged over rounds and members by an exchange of their own, and every member solves the same problem: all
choose alike. The first choice is made after the first `window` rounds, a new one every `refresh` rounds; until then
every layer is written as `like` says. A choice is left only for one that saves another 5 %.

Error   at most `limit` times that of the uniform setting, on the tensors measured.
Size    that of the options chosen, and 8 bytes for each layer and option in rounds that measure.
State   shared: the choice, the tables under way, a counter; alike on all members.
Cost    a round that measures encodes and decodes every layer with every option; of powersgd it takes the eigenvalues
        of M M^T.
Source  Alimohammadi et al. 2022, arXiv:2210.17357 (L-GreCo): its dynamic programme, window of 10 and refresh of 100.
Differs options are codecs, or ranks of powersgd: budget(powersgd(1), powersgd(2), powersgd(4)). A rank's error is what
        the singular values beyond it hold, which the warm start comes near; where ranks change, Q is drawn anew.
        Squares of errors are added, which is what error feedback's theory adds up; norm="plain" adds norms as L-GreCo
        does. All members measure, not one; sizes are exact, not ranks times rows and columns. rule="proportional" is a
        control: all layers may lose the same share of their energy (save="bytes") or take bytes in proportion to their
        elements (save="error"), as much as keeps to the limit.
Avoid   on models of a few layers alike, where there is nothing to choose.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from thinwire.aggregators import Mean
from thinwire.codecs.allocation import Choice, Table, allocate, in_proportion, total
from thinwire.codecs.base import Codec, Shapes
from thinwire.codecs.layers import Layers
from thinwire.codecs.options import call, changed, is_number, is_whole
from thinwire.codecs.powersgd import PowerSGD
from thinwire.codecs.precision import fp32
from thinwire.codecs.stages import Result, Stage, Staged, Stages, Tensors, is_contractive, wants_feedback
from thinwire.errors import ConfigError
from thinwire.randomness import mix

Save = Literal["bytes", "error"]
Norm = Literal["squared", "plain"]
Rule = Literal["dynamic", "proportional"]

_MOST = float(np.finfo(np.float32).max)  # a norm may overflow float32; its square does not overflow float64
_INNER = "powersgd."  # before the names of what powersgd remembers
_WHOLE = 1 << 30  # a rank at which nothing is saved: the parameter goes as it is
_DWELL = 0.95  # a new choice must cost at most this share of the one in force


@dataclass(frozen=True)
class Budget(Staged):
    """Options for every layer, and what is to be saved; see `budget`.

    options  codecs to choose from
    like     which of them, from 0, is the uniform setting that sets the limit
    save     what becomes least: bytes at the uniform setting's error, or error at its bytes
    limit    factor on the uniform setting's error (or bytes)
    refresh  rounds from one choice to the next
    window   rounds whose tensors are measured before a choice
    norm     whether squares of errors are added, or errors
    rule     how the choice is made
    small    elements below which a parameter is written as it is
    """

    options: tuple[Codec | PowerSGD, ...]
    like: int
    save: Save = "bytes"
    limit: float = 1.0
    refresh: int = 100
    window: int = 10
    norm: Norm = "squared"
    rule: Rule = "dynamic"
    small: int = 1024
    shapes: Shapes = field(default=(), repr=False)

    def __post_init__(self) -> None:
        ranks = bool(self.options) and isinstance(self.options[0], PowerSGD)
        strangers = [option for option in self.options if not isinstance(option, PowerSGD if ranks else Codec)]
        if strangers or len(self.options) < 2:
            raise ConfigError(
                f"a budget with option {strangers[0]!r}" if strangers else f"a budget of {len(self.options)} option(s)",
                expected="two codecs or more to choose from, or two ranks of powersgd or more",
                mend="write budget(topk(1/200), topk(1/100), topk(1/50)); error feedback goes around it",
            )
        for name, choices in (("save", Save), ("norm", Norm), ("rule", Rule)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"budget: {name}={getattr(self, name)!r}",
                    expected=f"{name} one of {', '.join(map(repr, get_args(choices)))}",
                    mend=f"leave it out for {get_args(choices)[0]!r}",
                )
        if not is_whole(self.like, 0, len(self.options) - 1):
            raise ConfigError(
                f"budget: like={self.like!r} of {len(self.options)} options",
                expected=f"a whole number from 0 to {len(self.options) - 1}: the option that sets the limit",
                mend="leave it out for the one in the middle",
            )
        if not (is_number(self.limit) and 0 < self.limit < math.inf):
            raise ConfigError(f"budget: limit={self.limit!r}", expected="a number above 0", mend="leave it out for 1")
        if not (is_whole(self.refresh, 1) and is_whole(self.window, 1, self.refresh)):
            raise ConfigError(
                f"budget: window={self.window!r} with refresh={self.refresh!r}",
                expected="whole numbers: a window of at least one round, not longer than a refresh",
                mend="leave them out for 10 and 100",
            )
        if not is_whole(self.small, 0):
            raise ConfigError(
                f"budget: small={self.small!r}",
                expected="a whole number of at least 0: elements below which a parameter is written as it is",
                mend="leave it out for 1024",
            )

    @property
    def spec(self) -> str:
        like = {} if self.like == len(self.options) // 2 else {"like": self.like}
        return call("budget", *(option.spec for option in self.options), **like, **changed(self))

    @property
    def wants_feedback(self) -> bool:
        return any(wants_feedback(option) for option in self.options)

    @property
    def contractive(self) -> bool:
        return all(is_contractive(option) for option in self.options)

    @property
    def needs_shapes(self) -> bool:
        return any(isinstance(option, PowerSGD) for option in self.options)

    def fit(self, shapes: Shapes) -> Budget:
        return replace(self, shapes=shapes)

    def run(self, x: Tensor, shared: Tensors, key: int) -> Stages:
        shapes = self.shapes or ((1, len(x)),)
        large = _large(shapes, self.small if self.shapes else 0)
        number = int(shared["number"]) if shared else 0
        choice = shared["choice"].cpu().numpy() if shared else np.full(len(large), self.like)
        how = self.written(choice, shapes)
        if isinstance(how, Staged):
            inner = {name.removeprefix(_INNER): held for name, held in shared.items() if name.startswith(_INNER)}
            result = yield from how.run(x, inner, key)
        else:
            result = Result(*(yield Stage(x, how, whole=True)), {})
        after = {_INNER + name: held for name, held in result.shared.items()}
        after |= {"number": torch.tensor(number + 1), "choice": torch.from_numpy(choice.copy())}
        if large and self._measures(number):
            table, _ = yield Stage(self.measure(x, shapes, key), rule=Mean())
            total = table + shared["table"] if "table" in shared else table
            if (number + 1 - self.window) % self.refresh:
                after["table"] = total
            else:
                chosen = self.choose(total.double().cpu().numpy(), choice)
                if not np.array_equal(chosen, choice):  # a warm start is of the ranks that were
                    after = {"number": after["number"]}
                after["choice"] = torch.from_numpy(chosen)
        return replace(result, shared=after)

    def _measures(self, number: int) -> bool:
        """Whether round `number` is in a window: the first rounds, and the last ones before every refresh."""
        return number < self.window or (number - self.window) % self.refresh >= self.refresh - self.window

    def written(self, choice: Choice, shapes: Shapes) -> Layers | PowerSGD:
        """The codec of a choice, one option for every parameter that is not small, in order."""
        first, small = self.options[0], self.small if self.shapes else 0
        if isinstance(first, PowerSGD):
            chosen = dict(zip(_large(shapes, small), choice, strict=True))
            ranks = [self._rank(chosen[i]) if i in chosen else _WHOLE for i in range(len(shapes))]
            return replace(first, ranks=tuple(ranks)).fit(shapes)
        picked = tuple(option for option in (self.options[i] for i in choice) if isinstance(option, Codec)) or (fp32,)
        label = f"budget(#{hashlib.blake2b(choice.tobytes(), digest_size=4).hexdigest()})"
        return replace(Layers(picked, small).fit(shapes), label=label)

    def _rank(self, option: int) -> int:
        chosen = self.options[option]
        assert isinstance(chosen, PowerSGD)
        return chosen.rank

    def measure(self, x: Tensor, shapes: Shapes, key: int) -> Tensor:
        """What every option would lose and write.

        returns  float32 [layers * (2 options + 1)]: for every parameter that is not small the norms of the errors, the
                 bytes, and the norm of the parameter's part of x
        """
        rows, start = [], 0
        wanted = set(_large(shapes, self.small if self.shapes else 0))
        for number, shape in enumerate(shapes):
            piece = x[start : start + math.prod(shape)]
            start += len(piece)
            if number in wanted:
                errors, sizes = [], []
                for option, how in enumerate(self.options):
                    error, size = _lost(how, piece, shape, mix(key, number, option))
                    errors.append(error)
                    sizes.append(size)
                rows.append(x.new_tensor([*errors, *sizes, float(piece.norm())]))
        return torch.cat(rows)

    def choose(self, table: Table, current: Choice) -> Choice:
        """The option of every layer, from what was measured in all: `measure`'s rows, added over rounds."""
        count = len(self.options)
        rows = np.minimum(table.reshape(len(current), 2 * count + 1), _MOST)
        power = 2 if self.norm == "squared" else 1
        errors, sizes, energies = rows[:, :count] ** power, rows[:, count:-1], rows[:, -1] ** power
        weight, value = (errors, sizes) if self.save == "bytes" else (sizes, errors)
        limit = self.limit * weight[:, self.like].sum()
        if self.rule == "dynamic":
            chosen = allocate(weight, value, limit)
        else:
            elements = sizes[:, self.like]  # a uniform setting's bytes are in proportion to them
            chosen = in_proportion(weight, value, limit, energies if self.save == "bytes" else elements)
        keeps = total(weight, current) <= limit and total(value, chosen) > _DWELL * total(value, current)
        return np.asarray(current if keeps else chosen, dtype=np.int64)


def _lost(how: Codec | PowerSGD, piece: Tensor, shape: tuple[int, ...], key: int) -> tuple[float, int]:
    """The norm of what an option loses of a parameter, and the bytes that it writes."""
    if isinstance(how, PowerSGD):
        return how.expected(piece, shape)
    codec = how.fit((shape,))
    fields = codec.encode(piece, key)
    error = piece - codec.decode(fields, len(piece), key)
    return float(error.norm()), sum(field.numel() * field.element_size() for field in fields.values())


def _large(shapes: Shapes, small: int) -> list[int]:
    """Numbers of the parameters that are not small: those that `Layers` does not write as they are."""
    return [number for number, shape in enumerate(shapes) if len(shape) > 1 and math.prod(shape) >= small]


def budget(
    *options: Codec | PowerSGD, like: int | None = None, save: Save = "bytes", limit: float = 1.0, refresh: int = 100,
    window: int = 10, norm: Norm = "squared", rule: Rule = "dynamic", small: int = 1024,
) -> Budget:  # fmt: skip
    """Choose for every layer: `budget(topk(1/200), topk(1/100), topk(1/50))`; the one in the middle sets the limit."""
    uniform = len(options) // 2 if like is None else like
    return Budget(options, uniform, save, limit, refresh, window, norm, rule, small)
