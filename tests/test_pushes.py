"""Asynchronous outer steps: the rule's equalities, replay, unlike speeds, resuming, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import thinwire
from small import batch, loss_of, make_model
from thinwire import ConfigError, Network
from thinwire.codecs import bf16, feedback, int8, parse, topk
from thinwire.links.base import Link
from thinwire.links.local import run
from thinwire.outer import Nesterov, Now
from thinwire.pushes import DelayedNesterov, Held, Pushed, asynchronous

# --- the rule --------------------------------------------------------------------------------------------------------


def held(n: int, dtype: torch.dtype = torch.float64) -> Held:
    zeros = torch.zeros(n, dtype=dtype)
    return Held(torch.randn(n, generator=torch.Generator().manual_seed(5), dtype=dtype), zeros, zeros)


def test_as_many_pushes_from_one_point_are_a_nesterov_step_on_their_mean():
    """Three times four pushes; in float64 to 1e-14."""
    rule, outer, generator = DelayedNesterov(0.7, 0.9), Nesterov(0.7, 0.9), torch.Generator().manual_seed(1)
    ours = held(20)
    anchor, memory = ours.anchor, {}
    for _ in range(3):
        pushes = torch.randn(4, 20, generator=generator, dtype=torch.float64)
        for g in pushes:
            ours = rule.take(ours, g, 0, 4)
        anchor, memory = outer.step(anchor, pushes.mean(dim=0), memory, Now())
        assert torch.allclose(ours.anchor, anchor, atol=1e-14)


def test_a_buffer_of_one_is_nesterov_on_every_push():
    rule, outer, generator = DelayedNesterov(0.3, 0.8, buffer=1), Nesterov(0.3, 0.8), torch.Generator().manual_seed(1)
    ours = held(20)
    anchor, memory = ours.anchor, {}
    for _ in range(5):
        g = torch.randn(20, generator=generator, dtype=torch.float64)
        ours = rule.take(ours, g, 0, 4)
        anchor, memory = outer.step(anchor, g, memory, Now())
        assert torch.allclose(ours.anchor, anchor, atol=1e-14)


def test_delay_and_momentum_on_a_quadratic():
    """Four members push in turn, three pushes old, each 0.4 of its way: momentum on each diverges, delayed not."""

    def error(rule: DelayedNesterov, pushes: int = 400) -> float:
        state = Held(torch.ones(1, dtype=torch.float64), *torch.zeros(2, 1, dtype=torch.float64))
        seen = [state.anchor] * 4
        for number in range(pushes):
            member = number % 4
            state = rule.take(state, 0.4 * seen[member], 3, 4)
            seen[member] = state.anchor
        return abs(state.anchor.item())

    assert not error(DelayedNesterov(0.7, 0.9, buffer=1)) < 1e6
    assert error(DelayedNesterov(0.7, 0.9, buffer=4)) < 2e-3
    assert error(DelayedNesterov(0.07, 0.9, buffer=1)) < 1e-2


def test_old_pushes_can_weigh_less():
    start, g = held(3), torch.ones(3, dtype=torch.float64)
    weighed = DelayedNesterov(0.5, 0.9, buffer=2, stale=0.5).take(start, g, 3, 4)
    assert torch.allclose(start.anchor - weighed.anchor, 0.25 * g * 0.5, atol=1e-15), "(1 + 3)^-0.5 = 1/2"
    fresh = DelayedNesterov(0.5, 0.9, buffer=2, stale=0.5).take(start, g, 0, 4)
    assert torch.equal(fresh.anchor, DelayedNesterov(0.5, 0.9, buffer=2).take(start, g, 7, 4).anchor)


# --- runs ------------------------------------------------------------------------------------------------------------


def go(link: Link, *, steps: int | None = 40, save_at: int | None = None, bad: int | None = None,
       **options: Any) -> dict[str, Any]:  # fmt: skip
    """Train for so many local steps, or until all are told that it is over."""
    pushes: list[tuple[Pushed, Tensor]] = []

    def fresh() -> Any:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
        observer = lambda pushed, g: pushes.append((pushed, g.clone()))  # noqa: E731
        sync = asynchronous(model, optimizer, link, observer=observer, **{"every": 5, **options})
        sync.__enter__()
        return model, optimizer, sync

    model, optimizer, sync = fresh()
    start = sync.anchor
    while not sync.over and (steps is None or sync.step < steps):
        loss_of(model, *batch(sync.step, link.rank)).backward()
        if bad == sync.step and link.rank == 1:
            model[0].weight.grad.fill_(float("nan"))
        optimizer.step()
        optimizer.zero_grad()
        if sync.step == save_at:
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            saved = sync.state_dict(), weights, optimizer.state_dict()
            sync.finish()
            model, optimizer, sync = fresh()
            model.load_state_dict(saved[1])
            optimizer.load_state_dict(saved[2])
            sync.load_state_dict(saved[0])
    ended = link.now()
    sync.__exit__(None, None, None)
    live = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {
        "steps": sync.step, "pushes": sync.pushes, "live": live, "anchor": sync.anchor, "log": sync.log,
        "start": start, "brought": pushes, "seconds": ended, "waited": sync.wait_s,
        "loss": loss_of(model, *batch(10_000, 99, 200)).item(),
    }  # fmt: skip


def test_all_end_with_one_model_and_have_learnt():
    results = run(3, lambda link: go(link, steps=200), Network(step_s=[0.1, 0.13, 0.4], latency_s=0.05))
    for each in results:
        assert torch.equal(each["live"], results[0]["anchor"])
        assert torch.equal(each["anchor"], results[0]["anchor"])
    assert results[0]["loss"] < 1.0, "1.6 before"
    assert {pushed.member for pushed in results[0]["log"]} == {0, 1, 2}
    assert max(pushed.staleness for pushed in results[0]["log"]) > 0


def test_the_log_gives_the_anchor_again():
    """From what each push brought, in the order of the log, to the bit."""
    rule = DelayedNesterov(0.5, 0.8, stale=0.5)
    options = {"rule": rule, "codec": int8, "steps": 60}
    first = run(3, lambda link: go(link, **options), Network(step_s=[0.1, 0.13, 0.4], latency_s=0.05))[0]
    zeros = torch.zeros_like(first["start"])
    state = Held(first["start"], zeros, zeros)
    assert [pushed for pushed, _ in first["brought"]] == list(first["log"])
    for pushed, g in first["brought"]:
        state = rule.take(state, g, pushed.staleness, 3)
    assert torch.equal(state.anchor, first["anchor"])


def test_the_same_call_gives_the_same_bits():
    def once() -> Tensor:
        network = Network(step_s=[0.1, 0.13, 0.4], latency_s=0.05)
        return run(3, lambda link: go(link, codec=feedback(topk(0.2))), network)[0]["anchor"]

    assert torch.equal(once(), once())


def test_one_member_alone_is_diloco():
    """A buffer of one, nobody else: DiLoCo's own steps; float32 sums in another order."""
    alone = run(1, lambda link: go(link, steps=20, by_speed=False))[0]
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    method = thinwire.diloco(every=5)

    def member(link: Link) -> Tensor:
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            for step in range(20):
                loss_of(model, *batch(step, 0)).backward()
                optimizer.step()
                optimizer.zero_grad()
            return sync.consensus()[0]

    assert torch.allclose(alone["anchor"], run(1, member)[0], atol=1e-5)


def test_a_slow_member_delays_nobody():
    """Four times as slow: the others' 60 steps take 6 s and two exchanges each push, whatever it does."""
    results = run(3, lambda link: go(link, steps=60), Network(step_s=[0.1, 0.1, 0.4], latency_s=0.01))
    assert results[0]["seconds"] < 6.5
    assert results[1]["seconds"] < 6.5
    assert results[2]["seconds"] > 24


def test_slow_members_push_after_fewer_steps():
    network = Network(step_s=[0.1, 0.2], latency_s=0.001)
    with_it, without = (run(2, lambda link, s=s: go(link, steps=None, until=20, by_speed=s), network) for s in (1, 0))
    assert abs(with_it[0]["pushes"] - with_it[1]["pushes"]) <= 2
    assert without[0]["pushes"] == 2 * without[1]["pushes"]
    assert with_it[1]["steps"] == 5 + 2 * (with_it[1]["pushes"] - 1), "one push to find out, then floor(5 / 2)"


def test_the_end_is_told_to_all():
    results = run(3, lambda link: go(link, steps=None, until=30), Network(step_s=[0.1, 0.1, 0.3], latency_s=0.01))
    assert 30 <= len(results[0]["log"]) <= 33


def test_an_answer_may_come_while_local_steps_go_on():
    network = Network(step_s=0.1, latency_s=0.1)
    waiting = run(2, lambda link: go(link, steps=60), network)[1]
    hidden = run(2, lambda link: go(link, steps=60, overlap=3), network)[1]
    assert waiting["waited"] == pytest.approx(12 * 0.2)
    assert hidden["waited"] == pytest.approx(0.2), "for the last one alone"
    assert hidden["loss"] < 1.6
    assert not torch.equal(waiting["anchor"], hidden["anchor"])


@pytest.mark.parametrize("options", [{}, {"overlap": 2}, {"codec": feedback(topk(0.2))}], ids=str)
def test_a_stopped_run_goes_on(options: dict[str, Any]):
    """All save at one moment; alone, where nobody's arrival depends on how long that takes, to the bit."""
    whole = run(1, lambda link: go(link, by_speed=False, **options))[0]
    parted = run(1, lambda link: go(link, by_speed=False, save_at=17, **options))[0]
    assert torch.equal(whole["anchor"], parted["anchor"])
    network = Network(step_s=[0.1, 0.13, 0.4], latency_s=0.05)
    together = run(3, lambda link: go(link, save_at=17, **options), network)
    assert all(torch.equal(each["live"], together[0]["anchor"]) for each in together)
    assert [each["steps"] for each in together] == [40, 40, 40]


def test_a_member_without_finite_values_starts_over_from_the_anchor():
    results = run(3, lambda link: go(link, bad=7), Network(step_s=0.1, latency_s=0.01))
    assert all(bool(each["live"].isfinite().all()) for each in results)
    assert all(torch.equal(each["live"], results[0]["anchor"]) for each in results)


def test_bytes_up_are_the_codecs_and_down_are_the_anchors():
    def sent(link: Link, codec: Any) -> int:
        go(link, steps=20, codec=codec)
        return link.meter.by_purpose()["pushes"].sent_bytes

    n = sum(p.numel() for p in make_model().parameters())
    full, half = (run(2, lambda link, c=c: sent(link, c))[1] for c in (thinwire.codecs.fp32, bf16))
    assert full - half == pytest.approx(4 * 2 * n, abs=4 * 8 + 64), "four pushes, two bytes an element less"


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def refused(**options: Any) -> Any:
        asynchronous(model, optimizer, thinwire.links.local.alone(), **options)

    with pytest.raises(ConfigError, match=r"a push every 0 steps\n.*\n.*every=20"):
        refused(every=0)
    with pytest.raises(ConfigError, match=r"an overlap of 5 steps with a push every 5\n.*from 0 to 4"):
        refused(every=5, overlap=5)
    with pytest.raises(ConfigError, match=r"until=0 pushes"):
        refused(until=0)
    with pytest.raises(ConfigError, match=r"topk\(0.1\) without a memory.*\n.*\n.*feedback\(topk\(0.1\)\)"):
        refused(codec=topk(0.1))
    with pytest.raises(ConfigError, match=r"pushes with powersgd.*\n.*several exchanges"):
        refused(codec=parse("powersgd(1)"))
    with pytest.raises(ConfigError, match=r"pushes with ef21.*\n.*each member's own"):
        refused(codec=parse("ef21(topk(0.1))"))
    with pytest.raises(ConfigError, match="outer lr=0"):
        DelayedNesterov(0)
    with pytest.raises(ConfigError, match="buffer=0"):
        DelayedNesterov(buffer=0)
    with pytest.raises(ConfigError, match="stale=-1"):
        DelayedNesterov(stale=-1)


def test_members_with_other_options_are_refused():
    with pytest.raises(ConfigError, match="members disagree on every"):
        run(2, lambda link: go(link, every=5 + link.rank))


def test_a_state_of_another_run_is_refused():
    def member(link: Link) -> None:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with asynchronous(model, optimizer, link, every=5) as sync:
            state = sync.state_dict()
        with asynchronous(model, optimizer, link, every=6) as sync:
            sync.load_state_dict(state)

    with pytest.raises(ConfigError, match=r"of another run: its every is 5.*\n.*every 6"):
        run(1, member)
