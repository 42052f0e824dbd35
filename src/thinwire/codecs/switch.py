"""Another codec after some rounds, and warm-ups that come to it in stages.

    switch(A, rounds, B)            A for so many rounds, then B
    warmup(topk(share), rounds)     topk with larger shares first: share_e = share^((e+1) / (stages+1)), e = 0, 1, ...

With a final share of 0.1 % and five stages a warm-up sends 31.6 %, 10 %, 3.2 %, 1 % and 0.32 %.

State   the number of committed rounds, alike on all members; what `B` remembers, if it does.
Error   that of the codec in force.
Size    likewise.
Source  Lin et al. 2018 (DGC), arXiv:1712.01887, sec. 3.3: the large changes of the first epochs want more to be
        sent.
Differs stages are counted in rounds, not in epochs. A round that was skipped is not counted.
Avoid   in short runs: rounds, not steps, are counted, and a switch that never comes is the first codec alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Shapes
from thinwire.codecs.options import call, changed, is_whole
from thinwire.codecs.stages import Result, Stage, Staged, Stages, Tensors, is_contractive, wants_feedback
from thinwire.codecs.topk import TopK, warmup_shares
from thinwire.errors import ConfigError

_INNER = "then."  # before the names of what `then` remembers


@dataclass(frozen=True)
class Switch(Staged):
    """One codec after the other.

    first   for the first `rounds` rounds
    rounds  at least 1
    then    for all others; a codec or a round of several exchanges
    """

    first: Codec
    rounds: int
    then: Codec | Staged

    def __post_init__(self) -> None:
        _check_rounds("switch", self.rounds)
        if not (isinstance(self.first, Codec) and isinstance(self.then, Codec | Staged)):
            raise ConfigError(
                f"switch from {_told(self.first)} to {_told(self.then)}",
                expected="a codec, a number of rounds, and another codec or a round of several exchanges",
                mend="write switch(int8, 100, topk(1/64)); error feedback goes around it: feedback(switch(...))",
            )

    @property
    def spec(self) -> str:
        return f"switch({self.first.spec}, {self.rounds}, {self.then.spec})"

    @property
    def wants_feedback(self) -> bool:
        return wants_feedback(self.first) or wants_feedback(self.then)

    @property
    def contractive(self) -> bool:
        return is_contractive(self.first) and is_contractive(self.then)

    @property
    def needs_shapes(self) -> bool:
        return isinstance(self.then, Staged) and self.then.needs_shapes

    @property
    def selects(self) -> bool:
        return self.first.selects and self.then.selects

    def fit(self, shapes: Shapes) -> Switch:
        return replace(self, first=self.first.fit(shapes), then=self.then.fit(shapes))

    def run(self, x: Tensor, shared: Tensors, key: int) -> Stages:
        done = _rounds(shared)
        how = self.first if done < self.rounds else self.then
        inner = {name.removeprefix(_INNER): held for name, held in shared.items() if name.startswith(_INNER)}
        if isinstance(how, Codec):
            result = Result(*(yield Stage(x, how, whole=True)), inner)
        else:
            result = yield from how.run(x, inner, key)
        return replace(result, shared=_counted(done, {_INNER + name: held for name, held in result.shared.items()}))


@dataclass(frozen=True)
class Warmup(Staged):
    """Larger shares first.

    codec   topk, or a chain that begins with it
    rounds  of all stages together
    stages  before the codec's own share is reached
    """

    codec: Codec
    rounds: int
    stages: int = 5

    def __post_init__(self) -> None:
        _check_rounds("warmup", self.rounds)
        if not is_whole(self.stages, 1, self.rounds):
            raise ConfigError(
                f"a warmup of {self.stages!r} stages in {self.rounds} rounds",
                expected="a whole number, at least 1 and at most as many as there are rounds",
                mend="leave stages out for 5, or warm up for more rounds",
            )
        if not (isinstance(self.codec, Codec) and all(isinstance(codec, TopK) for codec in self.codec.leads)):
            raise ConfigError(
                f"a warmup of {_told(self.codec)}: it has no share that could begin larger",
                expected="topk, or a chain that begins with it",
                mend="write warmup(topk(0.001) | int8, rounds=500), or switch(fp32, 500, ...) for other codecs",
            )

    @property
    def spec(self) -> str:
        return call("warmup", self.codec.spec, rounds=self.rounds, **changed(self))

    @property
    def wants_feedback(self) -> bool:
        return self.codec.traits.wants_feedback

    @property
    def contractive(self) -> bool:
        return is_contractive(self.codec)

    @property
    def selects(self) -> bool:
        return self.codec.selects

    def fit(self, shapes: Shapes) -> Warmup:
        return replace(self, codec=self.codec.fit(shapes))

    def at(self, done: int) -> Codec:
        """The codec in force after `done` rounds."""
        if done >= self.rounds:
            return self.codec
        stage = done * self.stages // self.rounds

        def larger(codec: Codec) -> Codec:
            if not isinstance(codec, TopK):
                return codec  # a small layer's, at full precision
            return replace(codec, share=warmup_shares(codec.share, self.stages)[stage])

        return self.codec.lead(larger)

    def run(self, x: Tensor, shared: Tensors, key: int) -> Stages:
        done = _rounds(shared)
        combined, sent = yield Stage(x, self.at(done), whole=True)
        return Result(combined, sent, _counted(done))


def _told(codec: object) -> str:
    return codec.spec if isinstance(codec, Codec | Staged) else repr(codec)


def _rounds(shared: Tensors) -> int:
    return int(shared["rounds"]) if shared else 0


def _counted(done: int, inner: Tensors | None = None) -> Tensors:
    return {"rounds": torch.tensor(done + 1), **(inner or {})}


def _check_rounds(name: str, rounds: object) -> None:
    if not is_whole(rounds, 1):
        raise ConfigError(
            f"{name} over {rounds!r} rounds",
            expected="a whole number, at least 1",
            mend="use the codec alone if there is to be nothing before it",
        )


switch, warmup = Switch, Warmup
