"""Members compare what they hold before a round; whatever differs is named, with who differs, on all of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thinwire
from small import adamw, batch, loss_of, make_model
from thinwire import ConfigError, PacketError, diloco, every_step, local_sgd, post_local_sgd, streaming_diloco
from thinwire.codecs import ErrorFeedback, ef21, fp32, int4, int8, topk
from thinwire.handshake import agree
from thinwire.links.faulty import Tampered
from thinwire.links.local import alone, run
from thinwire.outer import Adam
from thinwire.packet import Header, Kind, Packet


def refusals(member, members: int = 3) -> list[str]:
    """Every member's own refusal."""

    def caught(link):
        with pytest.raises(ConfigError) as error:
            member(link)
        return str(error.value)

    return run(members, caught)


def enter(link, *, model: nn.Module | None = None, method=None, seed: int = 0):
    model = model or make_model()
    with thinwire.synchronize(model, adamw(model), method or diloco(every=3), link, seed=seed):
        pass


METHODS = {
    "schedule": (diloco(every=4), "members disagree on method.schedule: member 1 has Every(steps=4, overlap=0)"),
    "codec": (diloco(every=3, codec=int4), "members disagree on method.codec: member 1 has int4"),
    "feedback": (diloco(every=3, codec=ErrorFeedback(int8)), "method.codec: member 1 has feedback(int8)"),
    "codec option": (diloco(every=3, codec=topk(0.3)), "method.codec: member 1 has feedback(topk(0.3))"),
    "outer": (diloco(every=3).but(outer=Adam()), "method.outer: member 1 has Adam("),
    "outer option": (diloco(every=3, momentum=0.8), "method.outer: member 1 has SGD(lr=0.7, momentum=0.8"),
    "topology": (
        diloco(every=3).but(topology=thinwire.method.Islands(2)),
        "method.topology: member 1 has Islands(size=2",
    ),
    "fragments": (
        streaming_diloco(every=3, overlap=0, codec=fp32, outer_lr=0.7, fragments=2),
        "method.payload: member 1 has Delta(fragments=2)",
    ),
    "phases": (post_local_sgd(), "members disagree on method.outer: member 1 has NoStep() to step 100, then Average()"),
}


@pytest.mark.parametrize("name", METHODS)
def test_another_method_is_refused(name):
    other, text = METHODS[name]
    told = refusals(lambda link: enter(link, method=other if link.rank == 1 else None))
    assert all(text in one for one in told)
    assert all("mend      give all members the same configuration" in one for one in told)


def test_other_weights_are_refused():
    told = refusals(lambda link: enter(link, model=make_model(seed=int(link.rank == 2))))
    assert all("members disagree on weights: member 2 has " in one for one in told)
    assert all("the same weights on all members" in one for one in told)
    assert all("seed every member alike before it builds the model, or call thinwire.broadcast" in one for one in told)


def test_one_bit_of_one_weight_is_enough():
    def member(link):
        model = make_model()
        if link.rank == 0:
            with torch.no_grad():
                model[4].bias[4] = torch.nextafter(model[4].bias[4], torch.tensor(9.0))
        enter(link, model=model)

    assert all("members disagree on weights: member 0 has" in one for one in refusals(member))


def test_other_persistent_buffers_are_refused_and_scratch_ones_are_nobodys_business():
    def model(link, persistent):
        module = make_model()
        module.register_buffer("extra", torch.tensor([float(link.rank)]), persistent=persistent)
        return module

    told = refusals(lambda link: enter(link, model=model(link, True)))
    assert all("members disagree on weights" in one for one in told)
    run(3, lambda link: enter(link, model=model(link, False)))


def test_another_shape_is_refused():
    def member(link):
        torch.manual_seed(0)
        enter(link, model=nn.Linear(12, 5 if link.rank else 6))

    assert all("members disagree on model: member 0 has" in one for one in refusals(member))


def test_another_frozen_set_is_refused():
    def member(link):
        model = make_model()
        if link.rank == 1:
            model[0].bias.requires_grad_(False)
        enter(link, model=model)

    for one in refusals(member):
        assert "members disagree on model: member 1 has" in one
        assert "with the same parameters trainable" in one


def test_another_seed_is_refused():
    told = refusals(lambda link: enter(link, seed=int(link.rank == 1)))
    assert all("members disagree on seed: member 1 has 1; the others have 0" in one for one in told)


def test_another_version_is_refused():
    def member(link):
        facts = {"version": "0.1.0" if link.rank else "0.2.0"}
        agree(link, facts)

    for one in refusals(member):
        assert "members disagree on version: member 0 has 0.2.0; the others have 0.1.0" in one
        assert "install the same version of thinwire on all members" in one


def test_a_fact_that_only_one_member_has_is_a_difference():
    told = refusals(lambda link: agree(link, {"method.new": "x"} if link.rank == 2 else {}))
    assert all("members disagree on method.new: member 2 has x; the others have nothing" in one for one in told)


def test_the_context_is_shared_and_depends_on_every_fact_and_on_the_group():
    def contexts(link):
        return [agree(link, facts) for facts in ({}, {"a": "1"}, {"a": "2"}, {"b": "1"})]

    three = run(3, contexts)
    assert three[0] == three[1] == three[2]
    assert len({*three[0], *run(2, contexts)[0]}) == 8
    assert 0 <= agree(alone(), {}) < 1 << 64


def test_too_much_to_say_is_refused():
    with pytest.raises(ConfigError, match=r"bytes to agree on\n.*at most 65536\n.*shorter options"):
        agree(alone(), {"method.codec": "x" * 70_000})


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\xff\xfe", "7", "[" * 5000])
def test_hostile_words_are_a_packet_error(text):
    """An intact packet whose text is no table of facts."""

    def change(purpose, sender, count, buffer):
        raw = torch.frombuffer(bytearray(text.encode("latin-1")), dtype=torch.uint8)
        return Packet("json", 0, {"text": raw}, Header(kind=Kind.HELLO, sender=sender)).to_bytes()

    def member(link):
        with pytest.raises(PacketError, match=r"member \d said hello"):
            agree(Tampered(link, change), {})

    run(2, member)


def test_a_damaged_hello_is_a_packet_error():
    def change(purpose, sender, count, buffer):
        buffer[70] ^= 1
        return buffer

    def member(link):
        with pytest.raises(PacketError, match="checksum"):
            agree(Tampered(link, change), {})

    run(2, member)


# --- resuming ---------------------------------------------------------------------------------------------------


def _saved_after(link, method, steps: int) -> dict:
    model = make_model()
    optimizer = adamw(model)
    with thinwire.synchronize(model, optimizer, method, link) as sync:
        for step in range(steps):
            loss_of(model, *batch(step, link.rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {"model": {k: v.clone() for k, v in model.state_dict().items()}, "sync": sync.state_dict()}


def _resume(link, method, saved) -> None:
    model = make_model()
    with thinwire.synchronize(model, adamw(model), method, link) as sync:
        model.load_state_dict(saved["model"])
        sync.load_state_dict(saved["sync"])


@pytest.mark.parametrize(
    "method", [diloco(every=2), local_sgd(every=2), every_step()], ids=["diloco", "local_sgd", "ddp"]
)
def test_states_that_do_not_belong_together_are_refused_on_all_members(method):
    """Member 1 brings the state of another run; the same step, other values."""

    def member(link):
        saved = _saved_after(link, method, 4)
        other = _saved_after(link, diloco(every=2, outer_lr=0.3) if method.payload.kind == "delta" else method, 2)
        if link.rank == 1:
            for name in ("model", "fragments"):
                (saved if name == "model" else saved["sync"])[name] = (other if name == "model" else other["sync"])[
                    name
                ]
        _resume(link, method, saved)

    for one in refusals(member):
        assert "members disagree on state.fragment 0: member 1 has" in one
        assert "load the checkpoint of the same step on all members" in one


def test_another_step_is_refused_on_all_members():
    def member(link):
        saved = [_saved_after(link, diloco(every=4), steps) for steps in (5, 6)]
        _resume(link, diloco(every=4), saved[link.rank == 2])

    told = refusals(member)
    assert all("members disagree on step: member 2 has 6; the others have 5" in one for one in told)


def test_momentum_that_differs_is_refused_though_the_anchor_is_the_same():
    def member(link):
        saved = _saved_after(link, diloco(every=2), 4)
        if link.rank == 0:
            memory = saved["sync"]["fragments"][0]["memory"]
            memory["momentum_buffer"] = memory["momentum_buffer"] * 1.01
        _resume(link, diloco(every=2), saved)

    assert all("members disagree on state.fragment 0: member 0 has" in one for one in refusals(member))


def test_a_round_that_arrived_on_one_member_alone_is_refused():
    """As after a rescue: one member saw the end of a round under way, the others did not."""
    method = streaming_diloco(every=6, fragments=1, overlap=4)

    def member(link):
        saved = _saved_after(link, method, 7)
        assert len(saved["sync"]["under_way"]) == 1
        if link.rank == 2:
            saved["sync"]["under_way"] = []
        _resume(link, method, saved)

    for one in refusals(member):
        assert "members disagree on state.round under way of fragment 0: member 2 has nothing" in one


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (diloco(every=3), "the saved state is of another method: its schedule is Every(steps=2, overlap=0)"),
        (diloco(every=2, codec=int8), "its codec is fp32"),
        (every_step(), "its schedule is"),
        (post_local_sgd(switch=3), "its schedule is"),
    ],
    ids=str,
)
def test_the_state_of_another_method_is_refused(other, text):
    def member(link):
        _resume(link, other, _saved_after(link, diloco(every=2), 4))

    for one in refusals(member):
        assert text in one
        assert "resume with the method of the checkpoint, or start anew from its weights" in one


def test_optimizers_that_differ_are_refused_where_members_take_the_same_steps():
    def member(method, link):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if link.rank else 0.2)
        with thinwire.synchronize(model, optimizer, method, link):
            pass

    told = refusals(lambda link: member(every_step(), link))
    assert all("members disagree on optimizer: member 0 has SGD [{'lr': 0.2" in one for one in told)
    run(3, lambda link: member(diloco(every=2), link))  # after a delta each may go its own way


def test_error_memories_of_another_member_or_group_are_not_taken_over():
    method = diloco(every=1, codec=topk(1 / 4))

    def save(link):
        model = make_model()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            loss_of(model, *batch(0, link.rank)).backward()
            optimizer.step()
            return sync.state_dict()

    saved = run(2, save)
    assert saved[0]["fragments"][0]["carried"]["own"]

    def load(states, link):
        model = make_model()
        with thinwire.synchronize(model, adamw(model), method, link) as sync:
            sync.load_state_dict(states[link.rank])
            return sync.state_dict()["fragments"][0]["carried"]["own"].get("residual")

    own = run(2, lambda link: load(saved, link))
    assert torch.equal(own[0], saved[0]["fragments"][0]["carried"]["own"]["residual"])
    assert run(2, lambda link: load([saved[0], saved[0]], link))[1] is None
    assert run(3, lambda link: load([saved[0], saved[1], saved[0]], link)) == [None] * 3


@pytest.mark.parametrize("codec", [ErrorFeedback(int8), ef21(int8)], ids=lambda codec: codec.spec)
def test_a_round_under_way_does_not_bring_back_what_is_to_be_forgotten(codec):
    """Saved between a round's halves; one member comes back with another's state, and the round is applied."""
    method = streaming_diloco(every=4, fragments=1, overlap=2, codec=codec)
    saved = run(3, lambda link: _saved_after(link, method, 5))
    assert all(one["sync"]["under_way"][0]["carried"]["own"] for one in saved)

    def resumed(link):
        mine = saved[0 if link.rank == 2 else link.rank]
        model = make_model()
        with thinwire.synchronize(model, adamw(model), method, link) as sync:
            model.load_state_dict(mine["model"])
            sync.load_state_dict(mine["sync"])
            sync.finish()
            assert sync.committed == 1
            return sync.state_dict()["fragments"][0]["carried"]

    results = run(3, resumed)
    assert results[2]["own"] == results[2]["dropped"] == {}
    tracks = method.feedback.tracks
    assert all(bool(one["own"]) != tracks for one in results[:2])
    assert all(one["shared"] == {} for one in results)
