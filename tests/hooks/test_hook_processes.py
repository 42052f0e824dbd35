"""The hooks in PyTorch's own engines, with real processes over loopback; each group runs once for all its tests."""

from __future__ import annotations

import pytest
import torch
from hook_member import CODECS, OPTIONS
from test_torch_link import members as start_members
from torch import Tensor

from small import same

MEMBER = "hooks/hook_member.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return group(tmp_path_factory, "pair", 2)


@pytest.fixture(scope="module")
def ddp(pair):
    return [member["ddp"] for member in pair]


@pytest.fixture(scope="module")
def fsdp(pair):
    return [member["fsdp"] for member in pair]


@pytest.fixture(scope="module")
def quad(tmp_path_factory):
    return group(tmp_path_factory, "quad", 4)


def group(factory, task: str, world: int) -> list[dict]:
    return start_members(task, factory.mktemp(task), world, program=MEMBER)[0]


def near(a: Tensor, b: Tensor, own: list[Tensor]) -> bool:
    """Two means of the same rows, summed in any order: each sum of N terms rounds N - 1 times, and then once more."""
    room = 2 * len(own) * 2.0**-24 * sum(each.abs() for each in own) / len(own)
    return bool(((a - b).abs() <= room).all())


@pytest.mark.parametrize("name", OPTIONS)
def test_two_members_train_as_without_the_hook_to_the_bit(ddp, name):
    """Halving is exact and a sum of two has one order. Mixed dtypes: torch adds in bfloat16, we in float32."""
    for plain, hook in (member[name] for member in ddp):
        assert hook["units"] > 1
        for a, b in zip(plain["gradients"], hook["gradients"], strict=True):
            assert (a is None) == (b is None)
        if name == "mixed dtypes":
            assert all(torch.allclose(a.float(), b.float(), atol=0.02) for a, b in each(plain, hook))
        else:
            assert all(torch.equal(a, b) for a, b in each(plain, hook))


def each(a: dict, b: dict) -> list[tuple[Tensor, Tensor]]:
    return list(zip(a["parameters"], b["parameters"], strict=True))


def test_a_parameter_that_no_member_used_has_no_gradient(ddp):
    _, hook = ddp[0]["unused"]
    assert [gradient is None for gradient in hook["gradients"]] == [False] * 6
    plain, _ = ddp[0]["unused"]
    assert plain["losses"] != ddp[1]["unused"][0]["losses"], "members took other branches"


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", CODECS)
def test_every_kind_of_codec_trains_and_members_agree(request, engine, name):
    first, second = request.getfixturevalue(engine)
    assert same(first[name]["parameters"], second[name]["parameters"])
    for member in (first, second):
        assert learns_like(member[name]["losses"], member["plain"]["losses"])


def learns_like(losses: list[float], plain: list[float]) -> bool:
    """The loss falls, and by nearly as much as without a hook; of 30 steps, the last five against the first five."""
    fell, should = (sum(each[:5]) - sum(each[-5:]) for each in (losses, plain))
    return 0.8 * should < fell < 1.2 * should and losses != plain


def test_a_hook_with_one_unit_is_the_every_step_method(ddp):
    """Error feedback over top-k: the same elements in another order, the same rounds, the same bits."""
    for member in ddp:
        assert member["hook, one unit"]["units"] == 1
        assert same(member["hook, one unit"]["parameters"], member["every step"]["parameters"])


@pytest.mark.parametrize("name", ["resumed topk", "resumed staged"])
def test_ddp_resumes_to_the_bit_with_other_buckets(ddp, name):
    """The resumed run has another bucket_cap_mb and DDP's first buckets; the units are those of the state."""
    for through, again in (member[name] for member in ddp):
        assert through["units"] == again["units"] > 1
        assert through["losses"][3:] == again["losses"]
        assert same(through["parameters"], again["parameters"])


def test_four_members_differ_from_plain_ddp_by_the_order_of_summation(quad):
    for member in quad:
        found = member["ddp"]
        for hook, plain, own in zip(found["hook"], found["plain"], zip(*found["own"], strict=True), strict=True):
            assert near(hook, plain, own)
    assert all(same(quad[0]["ddp"]["hook"], member["ddp"]["hook"]) for member in quad)
    for name in CODECS:
        agreed = [member["ddp codecs"][name]["parameters"] for member in quad]
        assert all(same(agreed[0], other) for other in agreed)


def test_a_member_that_dies_in_mid_training_is_named_in_backward(tmp_path):
    results, _ = start_members("dies_in_backward", tmp_path, 2, program=MEMBER, expect={1: 9})
    assert (results[0]["step"], results[0]["ranks"]) == (2, (1,))
    assert "lost member 1 during round 2, fragment" in results[0]["text"]


# --- FSDP -------------------------------------------------------------------------------------------------------------


def test_two_members_of_fsdp_train_as_without_the_hook_to_the_bit(fsdp):
    for member in fsdp:
        assert same(member["as it is"]["parameters"], member["fp32"]["parameters"])
        assert same(member["plain, narrow"]["parameters"], member["fp32, narrow"]["parameters"])
        assert not same(member["as it is"]["parameters"], member["fp32, narrow"]["parameters"])


def test_a_round_of_two_exchanges_gives_fsdp_the_same_shards(fsdp):
    for member in fsdp:
        assert same(member["as it is"]["parameters"], member["in two exchanges"]["parameters"])
        assert member["in two exchanges"]["sent_bytes"] > 1.5 * member["fp32"]["sent_bytes"]


def test_fsdp_resumes_to_the_bit(fsdp):
    for through, again in (member["resumed"] for member in fsdp):
        assert through["losses"][3:] == again["losses"]
        assert same(through["parameters"], again["parameters"])


@pytest.mark.parametrize("name", ["fsdp fp32", "fsdp across"])
def test_four_members_of_fsdp_differ_by_the_order_of_summation(quad, name):
    """Over one mesh, and as two islands of two members: the mean over the island, then over the two."""
    for member in quad:
        own = zip(*member["ddp"]["own"], strict=True)
        for hook, plain, rows in zip(member[name]["gradients"], member["fsdp plain"]["gradients"], own, strict=True):
            assert near(hook, plain, rows)


def test_islands_of_fsdp_train_with_a_strong_codec_between_them(quad):
    for member in quad:
        result = member["fsdp across topk"]
        assert same(result["parameters"], quad[0]["fsdp across topk"]["parameters"])
        assert learns_like(result["losses"], member["fsdp plain, long"]["losses"])
