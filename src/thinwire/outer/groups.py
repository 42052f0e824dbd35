"""An outer step for each group of parameters, by their names.

    a_g <- outer_g(a_g, D_g)    for each group g

Embeddings, norms and biases often bear another outer step than matrices do.

Error   one step for all groups is that step, to the bit.
State   the groups' own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.outer.base import Memory, Now, Outer

#: [begin, end) of each stretch of a vector that is a group's.
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PerGroup(Outer):
    """See `per_group`.

    groups  patterns and their outer steps
    rest    for parameters that no pattern matches
    fitted  the steps of those groups that have something in a vector, and what of it is theirs
    """

    groups: tuple[tuple[str, Outer], ...]
    rest: Outer
    fitted: tuple[tuple[str, Outer, Spans], ...] = field(default=(), repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if not self.groups:
            raise ConfigError(
                "outer steps for no groups of parameters",
                expected="a pattern of names and an outer step for each group",
                mend='per_group(("*.bias", SGD(0.4)), rest=Nesterov(0.7, 0.9)), or the step alone',
            )
        for outer in self._all():
            merges = outer.mixes or outer.recalls or outer.anticipates or outer.restarts
            if outer.accepts != "delta" or merges:
                raise ConfigError(
                    f"{outer!r} for a group of parameters",
                    expected="an outer step that is fed with deltas and whose anchor all parameters take over",
                    mend="put what merges around the groups: Eager(per_group(...)), Mix(per_group(...), 0.5)",
                )

    def _all(self) -> tuple[Outer, ...]:
        return (*(outer for _, outer in self.groups), self.rest)

    @property
    def linear(self) -> bool:
        return all(outer.linear for outer in self._all())

    def check_names(self, names: tuple[str, ...]) -> None:
        for pattern, _ in self.groups:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"outer step for {pattern!r}: no parameter is called so",
                    expected=f"a pattern that matches a name, such as {names[0]!r}",
                    mend="names are those of model.named_parameters(); * stands for any part of one, dots too",
                )

    def fit(self, names: tuple[str, ...], sizes: tuple[int, ...]) -> Outer:
        found: list[list[int]] = [[] for _ in self._all()]
        for index, name in enumerate(names):
            matching = [at for at, (pattern, _) in enumerate(self.groups) if fnmatchcase(name, pattern)]
            found[matching[0] if matching else -1].append(index)
        fitted = []
        for at, (outer, indices) in enumerate(zip(self._all(), found, strict=True)):
            if indices:
                fit = outer.fit(tuple(names[i] for i in indices), tuple(sizes[i] for i in indices))
                fitted.append((str(at), fit, tuple((sum(sizes[:i]), sum(sizes[: i + 1])) for i in indices)))
        return replace(self, fitted=tuple(fitted))

    def step(self, anchor: Tensor, update: Tensor, memory: Memory, now: Now) -> tuple[Tensor, Memory]:
        moved, after = anchor.clone(), dict[str, Tensor]()
        for at, outer, spans in self.fitted or (("rest", self.rest, ((0, len(anchor)),)),):
            before = {name[len(at) + 1 :]: value for name, value in memory.items() if name.startswith(f"{at}.")}
            stepped, held = outer.step(_cut(anchor, spans), _cut(update, spans), before, now)
            pieces = stepped.split_with_sizes([end - begin for begin, end in spans])
            for (begin, end), piece in zip(spans, pieces, strict=True):
                moved[begin:end] = piece
            after |= {f"{at}.{name}": value for name, value in held.items()}
        return moved, after


def _cut(vector: Tensor, spans: Spans) -> Tensor:
    return torch.cat([vector[begin:end] for begin, end in spans])


def per_group(*groups: tuple[str, Outer], rest: Outer) -> PerGroup:
    """per_group(("*.bias", SGD(0.4)), ("embedding.*", SGD(1.0)), rest=Nesterov(0.7, 0.9)).

    Patterns are those of file names (* ? [abc]); the first that matches a parameter's name has it.
    """
    return PerGroup(groups, rest)
