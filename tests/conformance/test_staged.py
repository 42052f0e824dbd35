"""What every round of several exchanges must do. The suite asks what it declares, never what it is called.

A new one needs a line in EXAMPLES; its own identities are in tests/codecs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from staged import rounds, run_alone
from thinwire.codecs import STAGED, ErrorFeedback, parse

EXAMPLES: dict[str, list[str]] = {
    "powersgd": ["powersgd(2)", "powersgd(1, warm=False)", "powersgd(2, factors=int8)"],
    "fetchsgd": ["fetchsgd(1/8, width=200)", "fetchsgd(1/2, width=500, rows=3, masking=False)"],
    "tagc": ["tagc", "tagc(0.05, 0.3)"],
    "budget": ["budget(int4, int8, window=1, small=0)", "budget(powersgd(1), powersgd(2), window=2, small=0)"],
    "switch": ["switch(int8, 1, topk(1/4))", "switch(fp32, 2, powersgd(1))"],
    "warmup": ["warmup(topk(1/16), rounds=2, stages=2)", "warmup(layers(topk(1/4), small=0), rounds=1, stages=1)"],
}
EXPRESSIONS = [expression for expressions in EXAMPLES.values() for expression in expressions]
SHAPES = ((24, 16), (16,), (8, 3, 4))
N = 24 * 16 + 16 + 96

every_staged = pytest.mark.parametrize("how", [parse(e) for e in EXPRESSIONS], ids=EXPRESSIONS)
DATA: dict[str, Callable[[torch.Generator], Tensor]] = {
    "normal": lambda g: torch.randn(N, generator=g),
    "zeros": lambda g: torch.zeros(N),
    "one": lambda g: torch.nn.functional.one_hot(torch.tensor(7), N).float(),
    "small": lambda g: torch.randn(N, generator=g) * 1e-30,
    "large": lambda g: torch.randn(N, generator=g) * 1e30,
}


def given(kind: str, members: int, count: int = 3) -> list[list[Tensor]]:
    """[round][member]."""
    return [
        [DATA[kind](torch.Generator().manual_seed(10 * number + rank)) for rank in range(members)]
        for number in range(count)
    ]


def test_every_table_entry_has_an_example():
    assert set(EXAMPLES) == set(STAGED)
    assert all(any(name in expression for expression in EXAMPLES[name]) for name in STAGED)


@every_staged
def test_expression(how):
    assert parse(how.spec) == how
    assert parse(how.spec).spec == how.spec == how.fit(SHAPES).spec


@every_staged
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("members", [1, 2, 3])
def test_members_agree_and_nothing_becomes_infinite(how, kind, members):
    """Three rounds with the memory that it wants; `rounds` compares updates and what stages remember, to the bit."""
    wanted = ErrorFeedback(how) if how.wants_feedback else how
    for done in rounds(wanted.fit(SHAPES), given(kind, members)):
        for combined in done:
            assert combined.update.shape == (N,)
            assert bool(combined.update.isfinite().all())
            assert combined.ranks == tuple(range(members))


@every_staged
def test_what_was_given_is_not_changed_and_the_same_again_gives_the_same(how):
    x, how = DATA["normal"](torch.Generator().manual_seed(1)), how.fit(SHAPES)
    shared: dict[str, Tensor] = {}
    for _ in range(3):
        before = x.clone(), {name: value.clone() for name, value in shared.items()}
        first, again = run_alone(how, x, shared)[0], run_alone(how, x.clone(), dict(shared))[0]
        assert torch.equal(x, before[0])
        assert all(torch.equal(value, before[1][name]) for name, value in shared.items())
        assert torch.equal(first.update, again.update)
        assert torch.equal(first.sent, again.sent)
        shared = dict(first.shared)
        assert all(isinstance(value, Tensor) for value in shared.values()), "what is saved is tensors"


@every_staged
def test_lengths_of_stages_do_not_depend_on_the_data(how):
    """A member that lost a packet goes on with zeros, and must send what the others expect."""
    how, shared = how.fit(SHAPES), {}
    for number in range(3):
        told = []
        for kind in ("normal", "zeros", "one"):
            result, stages = run_alone(how, DATA[kind](torch.Generator().manual_seed(number)), shared)
            told.append([(len(stage.vector), stage.codec.spec, stage.whole) for stage in stages])
            if kind == "normal":
                after = result.shared
        assert told[0] == told[1] == told[2]
        shared = after


@every_staged
def test_what_contracts_does(how):
    """||x - sent|| <= ||x||, up to float32: what error feedback asks for. Of one that does not, nothing is asked."""
    if not how.contractive:
        return
    shared: dict[str, Tensor] = {}
    for number in range(4):
        x = DATA["normal"](torch.Generator().manual_seed(number))
        result, _ = run_alone(how.fit(SHAPES), x, shared)
        assert float((x - result.sent).norm()) <= float(x.norm()) * (1 + 2**-12)
        shared = dict(result.shared)


@every_staged
@pytest.mark.parametrize("n", [1, 7])
def test_short_vectors_without_shapes(how, n):
    wanted = ErrorFeedback(how) if how.wants_feedback else how
    for done in rounds(wanted, [[torch.full((n,), float(rank + 1)) for rank in range(3)]] * 2):
        assert all(bool(combined.update.isfinite().all()) for combined in done)
