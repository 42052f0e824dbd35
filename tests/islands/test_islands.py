"""Models that islands of processes hold together, with real processes over loopback: one group runs for all tests."""

from __future__ import annotations

import re

import pytest
import torch
from island_member import CODECS, ENGINES, MEMBERS, METHODS, OPTIONS, reference

import thinwire
from small import make_model, same
from thinwire.packet import wire_bytes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def references():
    """What two members get that hold the whole model, by option."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {
        name: thinwire.run(2, lambda link, m=method, o=options: reference(link, m, **o))
        for name, (method, options) in OPTIONS.items()
    }
    torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [name for name in OPTIONS if "clipped" not in name])
def test_islands_are_the_same_method_on_as_many_whole_members_to_the_bit(quad, references, engine, name):
    """A sum of two gradients has one order, halving is exact, and all else is done element by element.

    The inner steps are on shards, and so are the deltas, the mean, the outer step and its momentum.
    """
    for rank, member in enumerate(quad):
        found, expected = member[engine, name], references[name][rank // MEMBERS]
        assert same(found["live"], expected["live"])
        assert same(found["consensus"], expected["consensus"])
        assert found["outcomes"] == expected["outcomes"]
        assert found["norms"] == (expected["norms"][rank % MEMBERS : rank % MEMBERS + 1])
    assert not same(references[name][0]["consensus"], [p.detach() for p in make_model().parameters()])


def test_weights_of_an_island_are_its_members_together(quad, references):
    """They differ between islands, so that a member's own would have given another mean."""
    assert not same(references["weighted"][0]["consensus"], references["diloco"][0]["consensus"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [name for name in OPTIONS if "clipped" in name])
def test_clipping_is_by_the_norm_of_the_whole_model(quad, references, engine, name):
    """Under FSDP2 the squares of n = 565 elements are added up in another order: n roundings at most, in float32."""
    room = 565 * 2.0**-24
    for rank, member in enumerate(quad):
        norms, expected = member[engine, name]["norms"], references[name][rank // MEMBERS]["norms"]
        assert all(abs(a - b) <= room * b for a, b in zip(norms, expected, strict=True))
        assert all(a > 0.05 for a in norms), "all were clipped"
        if engine != "fsdp":
            assert same(member[engine, name]["live"], references[name][rank // MEMBERS]["live"])
        plain = "ddp" if name == "clipped gradients" else "diloco"
        assert not same(member[engine, name]["live"], member[engine, plain]["live"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", METHODS)
def test_a_member_sends_across_as_much_as_it_holds(quad, references, engine, name):
    """P/n elements a round for each of n members (of odd tensors one has a row more); headers are on top of these."""
    whole = references[name][0]
    for rank, member in enumerate(quad):
        found = member[engine, name]
        parts = zip(quad[0][engine, name]["sizes"], quad[1][engine, name]["sizes"], strict=True)
        assert tuple(sum(sizes) for sizes in parts) == whole["sizes"]
        rounds = [outcome.fragment for outcome in found["outcomes"]]
        size = lambda n: wire_bytes("fp32", {"value": (torch.float32, n)})  # noqa: E731
        verdict = wire_bytes("verdict", {"digest": (torch.uint8, 8)})
        assert found["sent"]["rounds"] == sum(size(found["sizes"][f]) + verdict for f in rounds), rank
        assert whole["sent"]["rounds"] == sum(size(whole["sizes"][f]) + verdict for f in rounds)


@pytest.mark.parametrize("codec", CODECS)
def test_codecs_write_shards(quad, codec):
    """A shard of a matrix is a block of its rows, and as such a matrix; members agree whatever the codec."""
    first = quad[0]["fsdp", codec]
    assert all(same(first["consensus"], member["fsdp", codec]["consensus"]) for member in quad)
    assert not same(first["consensus"], quad[0]["fsdp", "diloco"]["consensus"])
    assert len(first["outcomes"]) == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_an_island_of_which_one_part_is_not_finite_abstains_as_a_whole(quad, engine):
    """Member 3 has the NaN, in a part that member 2 has not; all take the model of island 0 and train on."""
    for member in quad:
        found = member[engine, "poisoned"]
        assert [outcome.ranks for outcome in found["outcomes"]] == [(0, 1), (0,)]
        assert same(found["consensus"], quad[0][engine, "poisoned"]["consensus"])
        assert all(bool(p.isfinite().all()) for p in found["live"])


def test_back_to_back_too(quad):
    """The next round begins as one ends, from what the island as a whole has."""
    for member in quad:
        found = member["fsdp", "poisoned, back to back"]
        assert [outcome.ranks for outcome in found["outcomes"]] == [(0, 1), (0,), (0, 1)]
        assert all(bool(p.isfinite().all()) for p in found["live"])
        assert same(found["consensus"], quad[0]["fsdp", "poisoned, back to back"]["consensus"])


@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
def test_islands_resume_to_the_bit_in_mid_flight(quad, engine):
    for member in quad:
        through, again = member[engine, "resumed"]
        assert same(through["live"], again["live"])
        assert same(through["consensus"], again["consensus"])
        assert through["outcomes"][-len(again["outcomes"]) :] == again["outcomes"] != []


def test_member_0_of_each_part_gives_the_others_its_shards(quad):
    for rank, member in enumerate(quad):
        given = member["given"]
        assert same(given["after"], quad[0]["given"]["before"])
        assert same(given["before"], given["after"]) == (rank < MEMBERS)


def test_a_link_leads_over_the_members_of_a_group(quad):
    assert [member["given"]["place"] for member in quad] == [(0, (0, 1)), (1, (0, 1))] * 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sharded", "this FSDPSequential has parameters sharded over processes, and the link knows no island"),
        ("ddp", r"this DistributedDataParallel is averaged over processes in every step \(DDP\), and the link knows"),
        ("unlike", r"members disagree on method.schedule: member 1 has Every\(steps=3"),
        ("state", "the saved state is of another part"),
    ],
)
def test_what_cannot_be_one_model_is_refused(quad, name, text):
    for member in quad:
        assert re.match(text, member["refused"][name])
    assert 'thinwire.join(across=mesh["across"], within=mesh["within"])' in quad[0]["refused"]["sharded"]


def test_members_with_other_shards_are_refused(quad):
    for member in quad:
        text = member["refused"]["crossed"]
        assert text.startswith("members disagree on shards: member 1 has part ")
        assert "part 1 of 2 of an island's model (part 1 of 2 by Shard(dim=0); shapes " in text
        assert "shard alike in all islands" in text


def test_all_members_of_all_islands_learn_of_a_loss_and_keep_what_they_had(quad):
    """Part 1 of island 0 lost island 1; part 0 could reach it, and is told; island 1 sees that part 1 has left."""
    found = [member["loses"] for member in quad]
    assert [each["ranks"] for each in found[:2]] == [(1,), (1,)]
    assert "the line is cut" in found[1]["text"]
    assert "lost member 1 during round 1, fragment 0: part 1 of this island's model cannot reach it" in found[0]["text"]
    assert all("lost member" in each["text"] for each in found)
    for each in found:
        assert (each["committed"], each["begun"], each["step"]) == (1, 1, 4)
        assert same(each["kept"], each["now"])
