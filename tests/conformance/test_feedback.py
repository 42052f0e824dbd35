"""What every memory of the table must do. The suite asks what a scheme declares, never what it is called.

A new scheme needs a line in EXAMPLES, one in PLAIN, and one in LOSES_NOTHING if that can be said of it. Each check is a
function of a scheme, so that the last tests here can show that it fails for a scheme that lies.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import thinwire
from memories import Members, vectors
from small import adamw, local_steps, make_model, same, train
from thinwire.aggregators import Mean, WeightedMean
from thinwire.codecs import FEEDBACK, Codec, Feedback, Traits, fp16, fp32, int8, layers, parse, topk
from thinwire.codecs.base import Shapes
from thinwire.codecs.feedback import Place
from thinwire.codecs.stages import Tensors
from thinwire.collectives import Carried, combine
from thinwire.errors import ConfigError
from thinwire.links.local import run
from thinwire.method import Method
from thinwire.outer import SGD
from thinwire.packet import Fields, Header, Layout
from thinwire.payloads import Delta
from thinwire.rounds import FragmentState
from thinwire.schedules import Every
from thinwire.snapshot import pack_state, unpack_state
from thinwire.topologies import Group
from thinwire.ways import Exchange, shards

MEMBERS = 3  # of every group here; examples that name members name as many

#: Expressions of every scheme; each must pass every test here.
EXAMPLES: dict[str, list[str]] = {
    "feedback": ["feedback(topk(1/8))", "feedback(int4)", "feedback(topk(1/4) | int8, decay=0.5)"],
    "ef21": ["ef21(topk(1/8))", "ef21(int4)", "ef21(topk(1/4) | int8)"],
    "ef21w": ["ef21w(topk(1/8), smoothness=(1, 2, 5))", "ef21w(int8, smoothness=(3, 1, 1))"],
    "ef21_sgdm": ["ef21_sgdm(topk(1/8))", "ef21_sgdm(int4, eta=0.5)", "ef21_sgdm(topk(1/8), eta=0.3, double=True)"],
    "econtrol": ["econtrol(topk(1/8))", "econtrol(int4)", "econtrol(topk(1/4), eta=0.1)"],
    "diana": ["diana(int4(rounding='stochastic'))", "diana(randk(1/4, scaled=True))", "diana(qsgd, alpha=0.2)"],
    "dgc": ["dgc(topk(1/8))", "dgc(int4, masking=False)", "dgc(warmup(topk(1/8) | int8, 3, 2), nesterov=True, clip=4)"],
    "gmf": ["gmf(topk(1/8))", "gmf(topk(1/8) | int8, tau=0.3, rounds=5)"],
    "scallion": ["scallion(int8(rounding='stochastic'))", "scallion(int4(rounding='stochastic'), alpha=0.2)"],
    "scafcom": ["scafcom(topk(1/8))", "scafcom(int4)", "scafcom(topk(1/4) | int8, beta=1)"],
    "frozen_adam": ["frozen_adam(switch(fp32, 1, sign))", "frozen_adam(switch(fp32, 1, topk(1/8)), beta1=0.5)"],
}
#: An expression of each scheme that has nothing to do, and so gives the members' plain mean; None if it never does.
PLAIN: dict[str, str | None] = {
    "feedback": "feedback(fp32)",
    "ef21": "ef21(fp32)",
    "ef21w": "ef21w(fp32, smoothness=(1, 2, 5))",
    "ef21_sgdm": "ef21_sgdm(fp32, eta=1)",
    "econtrol": "econtrol(fp32)",
    "diana": "diana(fp32)",
    "dgc": "dgc(fp32, momentum=0)",
    "gmf": "gmf(topk(1), tau=0)",
    "scallion": "scallion(fp32)",
    "scafcom": "scafcom(fp32, beta=1)",
    "frozen_adam": None,
}
#: Those that lose nothing, and the part of `own` that makes up the sum: updates so far + its mean == means so far.
LOSES_NOTHING: dict[str, str] = {
    "feedback(topk(1/8))": "residual",
    "econtrol(topk(1/8), eta=0.1)": "residual",
    "dgc(topk(1/8), momentum=0)": "residual",
    "gmf(topk(1/8), momentum=0)": "residual",
}
EXPRESSIONS = [expression for expressions in EXAMPLES.values() for expression in expressions]
LENGTHS = (0, 1, 7, 300)
EPS = torch.finfo(torch.float32).eps

every_memory = pytest.mark.parametrize("memory", [parse(e) for e in EXPRESSIONS], ids=EXPRESSIONS)


def _bits(memory: Tensors) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in memory.items()}


def _mean(memory: Feedback, values: list[Tensor]) -> Tensor:
    """With the weights that the scheme gives, if it does."""
    places = [Place(rank, tuple(range(len(values)))) for rank in range(len(values))]
    weights = torch.tensor([memory.weight(place) or 1.0 for place in places], dtype=torch.float64)
    return ((weights / weights.sum()) @ torch.stack(values).double()).float()


# The checks -----------------------------------------------------------------------------------------------------------


def check_values(memory: Feedback, n: int) -> None:
    """Memories are empty at first, then finite tensors by name; updates are float32 [n]."""
    group = Members(memory, MEMBERS)
    for number in range(3):
        update = group.round(vectors(MEMBERS, n, number))
        assert update.dtype == torch.float32
        assert update.shape == (n,)
        for held in (*group.own, group.shared):
            assert all(isinstance(name, str) and value.isfinite().all() for name, value in held.items())


def check_purity(memory: Feedback, n: int) -> None:
    """Nothing that is given is changed, now or by a later round, and equal values give equal bits."""
    group, place = Members(memory, MEMBERS), Place(1, tuple(range(MEMBERS)))
    group.round(vectors(MEMBERS, n))
    x, own, shared = vectors(MEMBERS, n, 1)[1], group.own[1], group.shared
    before = _bits({"x": x}), _bits(own), _bits(shared)
    results = []
    for _ in range(2):
        target, held = memory.prepare(x, own, shared, place)
        told = _bits({"target": target}), _bits(held)
        sent = 0.5 * target
        after = memory.commit(target, held, sent)
        assert (_bits({"target": target}), _bits(held)) == told, "commit changed what prepare had given"
        update, shared_after = memory.receive(sent, shared, 0.5)
        assert torch.equal(sent, 0.5 * target), "what was sent is changed"
        results.append((_bits(after), _bits(shared_after), _bits({"update": update})))
    assert results[0] == results[1], "equal values, other results"
    memory.prepare(x, after, shared_after, place)
    assert (_bits(after), _bits(shared_after)) == results[0][:2], "a later round changed the memory"
    assert (_bits({"x": x}), _bits(own), _bits(shared)) == before


def check_weights(memory: Feedback) -> None:
    """All together are all, to the bit; shares of members who are not there together add up."""
    ranks = tuple(range(MEMBERS))
    weights = [memory.weight(Place(rank, ranks)) for rank in ranks]
    assert all((weight is not None) == memory.weighs for weight in weights)
    assert memory.share(ranks, ranks) == 1
    shares = [memory.share((rank,), ranks) for rank in ranks]
    assert all(0 < share <= 1 for share in shares)
    assert sum(shares) == pytest.approx(1)
    if memory.weighs:
        assert shares == pytest.approx([weight / sum(weights) for weight in weights])


def check_tracks(memory: Feedback) -> None:
    """`shared` holds the mean of what is in `own` under the same name, whoever was left out of whichever round.

    Tolerance: six rounds of three additions each, of numbers below 16.
    """
    if not memory.tracks:
        return
    group = Members(memory, MEMBERS)
    for number, absent in enumerate((None, 1, None, 0, 2, None)):
        x = vectors(MEMBERS, 40, number)
        group.round([None if rank == absent else v for rank, v in enumerate(x)])
        alike = [name for name in group.shared if all(name in own or not own for own in group.own)]
        assert alike, "nothing of `shared` is in `own`"
        for name in alike:
            mean = _mean(memory, [own.get(name, torch.zeros(40)) for own in group.own])
            torch.testing.assert_close(group.shared[name], mean, rtol=0, atol=6 * 3 * 16 * EPS)


def check_fit(memory: Feedback) -> None:
    shapes: Shapes = ((2, 3), (1,))
    shaped = _around(memory, Shaped(), layers(topk(1 / 2), small=1))
    fitted = shaped.fit(shapes)
    assert fitted.codec == shaped.codec.fit(shapes) != shaped.codec
    assert fitted == replace(shaped, codec=fitted.codec), "fitting changes the codec alone"
    assert fitted.spec == shaped.spec


def _around(memory: Feedback, *codecs: Codec) -> Feedback:
    """The scheme around the first codec that it does not refuse."""
    for codec in codecs:
        with suppress(ConfigError):
            return replace(memory, codec=codec)
    raise AssertionError(f"{memory.spec} goes around none of {codecs}")


def check_plain(memory: Feedback) -> None:
    """With nothing to do it is the plain mean.  Tolerance: six rounds of four roundings of numbers below 8."""
    group = Members(memory, MEMBERS)
    for number in range(6):
        x = vectors(MEMBERS, 40, number)
        torch.testing.assert_close(group.round(x), torch.stack(x).mean(dim=0), rtol=0, atol=6 * 4 * 8 * EPS)


def check_conservation(memory: Feedback, name: str) -> None:
    """Tolerance: eight rounds of four roundings of numbers below 32."""
    group = Members(memory, MEMBERS)
    came, given = torch.zeros(40), torch.zeros(40)
    for number in range(8):
        x = vectors(MEMBERS, 40, number)
        came, given = came + group.round(x), given + torch.stack(x).mean(dim=0)
        owed = torch.stack([own[name] for own in group.own]).mean(dim=0)
        torch.testing.assert_close(came + owed, given, rtol=0, atol=8 * 4 * 32 * EPS)
    assert owed.any(), "nothing was ever owed"


@dataclass(frozen=True)
class Shaped(Codec):
    """Lossless; knows shapes."""

    shapes: Shapes = field(default=(), repr=False)
    values = "value"

    @property
    def spec(self) -> str:
        return "shaped"

    @property
    def traits(self) -> Traits:
        return replace(fp32.traits, unbiased=True)

    def fit(self, shapes: Shapes) -> Shaped:
        return replace(self, shapes=shapes)

    def layout(self, n: int) -> Layout:
        return fp32.layout(n)

    def encode(self, x: Tensor, key: int) -> Fields:
        return fp32.encode(x, key)

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        return fp32.decode(fields, n, key)


# The table ------------------------------------------------------------------------------------------------------------


def test_every_table_entry_has_an_example() -> None:
    assert set(EXAMPLES) == set(PLAIN) == set(FEEDBACK)
    plain = [[PLAIN[name] or EXAMPLES[name][0]] for name in EXAMPLES]
    told = zip(EXAMPLES, EXAMPLES.values(), plain, strict=True)
    assert all(e.startswith(f"{name}(") for name, examples, also in told for e in (*examples, *also))


@every_memory
def test_expression(memory: Feedback) -> None:
    assert parse(memory.spec) == memory
    assert parse(memory.spec).spec == memory.spec
    assert hash(parse(memory.spec)) == hash(memory)


@every_memory
def test_values(memory: Feedback) -> None:
    for n in LENGTHS:
        check_values(memory, n)


@every_memory
def test_purity(memory: Feedback) -> None:
    for n in LENGTHS:
        check_purity(memory, n)


@every_memory
def test_weights(memory: Feedback) -> None:
    check_weights(memory)


@every_memory
def test_tracks(memory: Feedback) -> None:
    check_tracks(memory)


@every_memory
def test_fit(memory: Feedback) -> None:
    check_fit(memory)


@pytest.mark.parametrize("expression", [expression for expression in PLAIN.values() if expression])
def test_plain_mean(expression: str) -> None:
    check_plain(parse(expression))


@pytest.mark.parametrize("expression", LOSES_NOTHING)
def test_nothing_is_lost(expression: str) -> None:
    check_conservation(parse(expression), LOSES_NOTHING[expression])


@every_memory
def test_it_goes_around_codecs_of_its_class_alone_and_nothing_goes_after_it(memory: Feedback) -> None:
    name = memory.spec.split("(")[0]
    with pytest.raises(ConfigError, match=rf"^{name} around fp16: "):  # no bound of any kind: it overflows
        replace(memory, codec=fp16)
    for other in (memory, "int8", None):
        with pytest.raises(ConfigError, match=rf"^{name} around .*\n  expected  a codec"):
            replace(memory, codec=other)
    with pytest.raises(ConfigError, match=r"\| ...: what follows would be outside the error memory") as caught:
        memory | int8
    assert caught.value.mend == f"write {name}({memory.codec.spec} | ...)"


@every_memory
def test_memories_survive_being_written_down(memory: Feedback) -> None:
    group = Members(memory, MEMBERS)
    group.round(vectors(MEMBERS, 40))
    state = FragmentState(torch.zeros(0), carried=Carried(own=group.own[0], shared=group.shared))
    file = io.BytesIO()
    torch.save(pack_state(state), file)
    file.seek(0)
    back = unpack_state(torch.load(file, weights_only=True), torch.device("cpu")).carried
    assert _bits(back.own) == _bits(group.own[0])
    assert _bits(back.shared) == _bits(group.shared)


# Through real rounds --------------------------------------------------------------------------------------------------


def _rule(memory: Feedback) -> Mean | WeightedMean:
    return WeightedMean() if memory.weighs else Mean()


def _round(link: Any, memory: Feedback, x: Tensor, carried: Carried, number: int) -> Any:
    exchange = Exchange(
        channel=link.open("rounds"), rank=link.rank, route=Group(link.members), witnesses=link.members, how=memory,
        aggregator=_rule(memory), header=Header(round=number), key=number, now=link.now,
    )  # fmt: skip
    return combine(exchange, x, 1.0, carried, None)


@every_memory
def test_who_is_left_out_keeps_its_memory_and_the_mean_stays_right(memory: Feedback) -> None:
    """Member 1 has no finite values in rounds 1 and 3. What second encodings dropped is still owed by who dropped it.

    Tolerance: five rounds of five roundings of numbers below 16.
    """
    n = 600

    def member(link: Any) -> list[Any]:
        ended, carried = [], Carried()
        for number in range(5):
            x = vectors(MEMBERS, n, number)[link.rank]
            if link.rank == 1 and number in (1, 3):
                x[17] = float("nan")
            result = _round(link, memory, x, carried, number)
            if link.rank == 1 and number in (1, 3):
                assert result.carried.own is carried.own
                assert result.ranks == (0, 2)
            carried = result.carried
            ended.append(result)
        return ended

    results = run(MEMBERS, member)
    for number in range(5):
        carried = [ended[number].carried for ended in results]
        assert all(torch.equal(ended[number].update, results[0][number].update) for ended in results)
        assert all(_bits(each.shared) == _bits(carried[0].shared) for each in carried)
        if not memory.tracks:
            continue
        owed = [each.dropped.get("0", torch.zeros(end - begin)) for each, (begin, end) in _shards(carried, n)]
        for name in set(carried[0].shared) & set(carried[0].own):
            mean = _mean(memory, [each.own.get(name, torch.zeros(n)) for each in carried])
            torch.testing.assert_close(carried[0].shared[name] + torch.cat(owed), mean, rtol=0, atol=5 * 5 * 16 * EPS)


def _shards(carried: list[Carried], n: int) -> Any:
    return zip(carried, shards(n, len(carried)), strict=True)


def _method(memory: Feedback) -> Method:
    return Method(
        schedule=Every(2), payload=Delta(), codec=memory, aggregator=_rule(memory), outer=SGD(0.7, 0.9, nesterov=True)
    )


def _resumed(link: Any, method: Method, saved: Any, until: int) -> tuple[list[Tensor], Any]:
    """Go on from what `_saved` gave; the parameters and the state at the end."""
    model = make_model()
    optimizer = adamw(model)
    with thinwire.synchronize(model, optimizer, method, link) as sync:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        sync.load_state_dict(saved["sync"])
        local_steps(model, optimizer, link.rank, range(saved["sync"]["step"], until))
        return [p.detach().clone() for p in model.parameters()], sync.state_dict()["fragments"][0]["carried"]


def _saved(link: Any, method: Method, steps: int) -> Any:
    model = make_model()
    optimizer = adamw(model)
    file = io.BytesIO()
    with thinwire.synchronize(model, optimizer, method, link) as sync:
        local_steps(model, optimizer, link.rank, range(steps))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sync": sync.state_dict()}
        torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_memory
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(memory: Feedback) -> None:
    """And all members hold the same model at the end of a round."""
    method = _method(memory)
    whole = run(MEMBERS, lambda link: train(link, method, 6).live)
    in_two = run(MEMBERS, lambda link: _resumed(link, method, _saved(link, method, 3), 6)[0])
    assert all(same(a, b) for a, b in zip(whole, in_two, strict=True))
    assert all(same(whole[0], other) for other in whole)


@every_memory
def test_a_member_without_its_memory_begins_anew_and_with_it_all_who_know_its_mean(memory: Feedback) -> None:
    """Member 2 comes with the state of member 0, as one that takes another's place does."""
    method = _method(memory)
    states = run(MEMBERS, lambda link: _saved(link, method, 4))
    before = [state["sync"]["fragments"][0]["carried"] for state in states]
    assert all(carried["own"] for carried in before)
    states[2] = states[0]
    after = [carried for _, carried in run(MEMBERS, lambda link: _resumed(link, method, states[link.rank], 4))]
    assert after[2]["own"] == after[2]["dropped"] == {}
    for rank in (0, 1):
        kept = {} if memory.tracks else before[rank]["own"]
        assert _bits(after[rank]["own"]) == _bits(kept)
    assert all(_bits(each["shared"]) == ({} if memory.tracks else _bits(before[0]["shared"])) for each in after)
    live = [live for live, _ in run(MEMBERS, lambda link: _resumed(link, method, states[link.rank], 6))]
    assert all(value.isfinite().all() for value in live[0])


@every_memory
def test_a_smaller_group_begins_anew(memory: Feedback) -> None:
    if memory.weighs:
        return  # made for a number of members
    method = _method(memory)
    states = run(MEMBERS, lambda link: _saved(link, method, 4))
    after = run(MEMBERS - 1, lambda link: _resumed(link, method, states[link.rank], 4)[1])
    assert all(each["own"] == each["dropped"] == {} for each in after)
    assert all(not (memory.tracks and each["shared"]) for each in after)


# The checks can fail --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made(Feedback):
    """A scheme of loose parts, to declare one thing and do another; with none it is EF21."""

    codec: Any = field(default_factory=lambda: topk(1 / 8))
    tracks: bool = True
    weighs: bool = False
    target: Callable[[Tensor, Tensor], Tensor] = lambda x, g: x - g
    followed: Callable[[Tensor, Tensor], Tensor] = lambda g, sent: g + sent
    received: Callable[[Tensor, Tensor, float], Tensor] = lambda mean, combined, share: mean + share * combined
    told: Callable[[Tensor], Tensor] = lambda mean: mean
    shares: Callable[[tuple[int, ...], tuple[int, ...]], float] = lambda present, ranks: len(present) / len(ranks)
    fits: Callable[[Codec, Shapes], Codec] = lambda codec, shapes: codec.fit(shapes)

    @property
    def spec(self) -> str:
        return f"made({self.codec.spec})"

    def fit(self, shapes: Shapes) -> Made:
        return replace(self, codec=self.fits(self.codec, shapes))

    def prepare(self, x: Tensor, own: Tensors, shared: Tensors, place: Place) -> tuple[Tensor, Tensors]:
        estimate = own.get("estimate", torch.zeros(len(x)))
        return self.target(x, estimate), {"estimate": estimate, "x": x}

    def commit(self, target: Tensor, held: Tensors, sent: Tensor) -> Tensors:
        return {"estimate": self.followed(held["estimate"], sent), "residual": held["x"] - sent}

    def receive(self, combined: Tensor, shared: Tensors, share: float) -> tuple[Tensor, Tensors]:
        mean = self.received(shared.get("estimate", torch.zeros(len(combined))), combined, share)
        return self.told(mean), {"estimate": mean}

    def share(self, present: tuple[int, ...], ranks: tuple[int, ...]) -> float:
        return self.shares(present, ranks)


LIARS: dict[str, tuple[Made, Callable[[Feedback], None]]] = {
    "writes to its input": (Made(target=lambda x, g: x.sub_(g)), lambda m: check_purity(m, 40)),
    "writes to its memory": (Made(followed=lambda g, sent: g.add_(sent)), lambda m: check_purity(m, 40)),
    "writes to what all know": (Made(received=lambda mean, c, share: mean.add_(c)), lambda m: check_purity(m, 40)),
    "is drawn at random": (Made(target=lambda x, g: x + torch.rand(len(x))), lambda m: check_purity(m, 40)),
    "forgets the share": (Made(received=lambda mean, c, share: mean + c), check_tracks),
    "holds another mean": (Made(followed=lambda g, sent: g + 0.9 * sent), check_tracks),
    "is not finite": (Made(followed=lambda g, sent: g / 0), lambda m: check_values(m, 40)),
    "is of another length": (Made(told=lambda mean: mean[1:]), lambda m: check_values(m, 40)),
    "counts who is absent": (Made(shares=lambda present, ranks: 1.0), check_weights),
    "is never all": (Made(shares=lambda present, ranks: len(present) / len(ranks) * 0.999), check_weights),
    "says that it weighs": (Made(weighs=True), check_weights),
    "does not fit its codec": (Made(fits=lambda codec, shapes: codec), check_fit),
    "is no mean": (Made(fp32, told=lambda mean: 1.001 * mean), check_plain),
    "loses something": (Made(), lambda m: check_conservation(m, "residual")),
}


@pytest.mark.parametrize("lie", LIARS)
def test_a_scheme_that_lies_is_caught(lie: str) -> None:
    memory, check = LIARS[lie]
    with pytest.raises(AssertionError):
        check(memory)


def test_an_honest_one_is_not() -> None:
    check_values(Made(), 40)
    check_purity(Made(), 40)
    check_weights(Made())
    check_tracks(Made())
    check_fit(Made())
    check_plain(Made(fp32))
