"""States as manifests and pieces: equal ones are equal to the bit, and nothing is believed unchecked."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.elastic import pieces as module
from thinwire.elastic.dealing import Deal
from thinwire.elastic.pieces import PIECE_BYTES, Assembly, check, cut, digest_of, parse
from thinwire.elastic.shelf import Shelf
from thinwire.errors import ConfigError, PacketError


def state(scale=1.0):
    return {
        "anchor": [torch.arange(600) * scale, torch.full((2, 3), 0.5, dtype=torch.bfloat16)],
        "inner": {0: {"step": torch.tensor(3), "none": None}, 1: {"mask": torch.tensor([True, False])}},
        "ledger": {"epoch": 2, "loss": float("inf"), "name": "é", "flag": True, "empty": torch.empty(0, 4)},
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))
    elif isinstance(one, dict):
        assert set(one) == set(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            same(*pair)
    else:
        assert repr(one) == repr(other)


def put_together(made, manifest=None):
    assembly = Assembly(manifest or made.manifest)
    for digest, size in assembly.missing.items():
        check(digest, size, made.views[digest])
        assembly.put(digest, made.views[digest])
    assert not assembly.missing
    return assembly.state()


def test_a_state_comes_back_to_the_bit():
    made = cut(state())
    same(put_together(made, parse(made.manifest.text)), state())


def test_what_comes_back_is_in_memory_of_its_own():
    given_state = {"a": torch.zeros(4)}
    back = put_together(cut(given_state))
    given_state["a"].add_(1)
    assert back["a"].eq(0).all()


def test_equal_states_have_equal_manifests_whatever_the_order_of_their_dicts():
    def turned(value):
        if isinstance(value, dict):
            return {key: turned(value[key]) for key in reversed(value)}
        return value

    assert cut(turned(state())).manifest.text == cut(state()).manifest.text
    assert cut(state()).manifest.digest == digest_of(cut(state()).manifest.text)


def test_a_manifest_is_written_as_it_was_on_the_day_it_was_agreed_on():
    """Golden: members of two versions hold the same digest of the same state."""
    assert cut({"b": [torch.tensor([1.0, 2.0])], 1: "x"}).manifest.text == (
        b'{"format":"thinwire-state-1","tensors":[["float32",[2],'
        b'["b9c80b5adeca450753a16950c3cc655d271f7bef7a485bc83f112b72fef21d37"]]],'
        b'"tree":{"items":[[1,"x"],["b",[{"tensor":"0"}]]]}}'
    )


def test_only_what_changed_has_other_pieces():
    before, after = (
        {"a": torch.zeros(3_000_000), "b": torch.ones(10)},
        {"a": torch.zeros(3_000_000), "b": torch.ones(10)},
    )
    after["a"][2_500_000] = 1.0
    old, new = cut(before).manifest, cut(after).manifest
    assert [max(each.sizes()) for each in new.cuts] == [PIECE_BYTES, 40]
    assert new.cuts[0].nbytes == sum(new.cuts[0].sizes()) == 12_000_000
    assert old.cuts[0].digests[:2] == new.cuts[0].digests[:2]
    assert old.cuts[0].digests[2] != new.cuts[0].digests[2]
    assert old.cuts[1] == new.cuts[1]


def test_equal_pieces_are_there_once():
    assert list(cut({"a": torch.zeros(1 << 21), "b": torch.zeros(1 << 20)}).manifest.sizes.values()) == [PIECE_BYTES]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"a": {1, 2}}, "cannot hold /'a': set"),
        ({"a": [torch.ones(2, dtype=torch.complex64)]}, "cannot hold /'a'/0: torch.complex64"),
        ({"a": torch.eye(2).to_sparse()}, "cannot hold /'a': torch.float32, torch.sparse"),
        ({"a": {True: 1}}, "cannot hold /'a': a key of type bool"),
    ],
)
def test_what_a_state_cannot_hold(bad, told):
    with pytest.raises(ConfigError, match=told):
        cut(bad)


def test_a_manifest_has_a_bound(monkeypatch):
    monkeypatch.setattr(module, "MANIFEST_BYTES", 300)
    with pytest.raises(ConfigError, match="whose manifest has"):
        cut({"a": list(range(200))})
    with pytest.raises(PacketError, match="a manifest of 301 bytes"):
        parse(b" " * 301)


def changed(**other):
    told = json.loads(cut({"a": torch.ones(2), "b": [torch.ones(2)]}).manifest.text)
    told.update(other)
    return json.dumps(told, sort_keys=True, separators=(",", ":")).encode()


ONE = "ab" * 32


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no manifest"),
        (changed(format="thinwire-state-9"), "a state of format 'thinwire-state-9'"),
        (changed(more=1), "not written as thinwire writes it"),
        (changed() + b" ", "not written as thinwire writes it"),
        (changed(tensors={}), "without a list of tensors"),
        (changed(tensors=[1]), r"tensor 0 is not told as"),
        (changed(tensors=[["float31", [2], [ONE]]]), "type 'float31'"),
        (changed(tensors=[[["float32"], [2], [ONE]]]), "tensor 0 is of type"),
        (changed(tensors=[["float32", [-2], [ONE]]]), r"shape \[-2\]"),
        (changed(tensors=[["float32", [True], [ONE]]]), r"shape \[True\]"),
        (changed(tensors=[["float32", [0, 10**40], []]]), "shape"),
        (changed(tensors=[["float32", [2], ["../../etc"]]]), "without a digest"),
        (changed(tensors=[["float32", [2], []]]), "has 0 pieces"),
        (changed(tensors=[["float32", [1 << 21], [ONE]]]), "has 1 pieces"),
        (changed(tensors=[["float32", [2], [ONE]]]), "a tree with 2 tensors, not the 1"),
        (changed(tensors=[["float32", [2], [ONE]], ["float32", [3], [ONE]]]), "with 8 bytes and with 12"),
        (changed(tree={"items": [["a", {"tensor": "1"}], ["b", {"tensor": "0"}]]}), "in order"),
        (changed(tree={"items": [["b", {"tensor": "0"}], ["a", {"tensor": "1"}]]}), "keys out of order"),
        (changed(tree={"items": [["a", {"tensor": "0"}], ["a", {"tensor": "1"}]]}), "keys out of order, or twice"),
        (changed(tree={"items": [[None, 1]]}), "no list of keys and values"),
        (changed(tree={"items": 3}), "no list of keys and values"),
        (changed(tree={"tensor": 3}), "no list of keys and values"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_right_is_refused(text, told):
    with pytest.raises(PacketError, match=told):
        parse(text)


def test_a_tree_has_a_bound_on_its_depth():
    deep = []
    for _ in range(70):
        deep = [deep]
    with pytest.raises(PacketError, match="more than 64 levels"):
        parse(changed(tree=deep))


def test_a_state_larger_than_there_is_room_for_is_refused():
    with pytest.raises(PacketError, match="a state of 16 bytes"):
        parse(changed(), most_bytes=15)
    parse(changed(), most_bytes=16)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_manifest_is_another_one_or_none(data):
    text = bytearray(cut(state()).manifest.text)
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(32, 126))
    try:
        manifest = parse(bytes(text))
    except PacketError:
        return
    assert manifest.text == text


def test_a_damaged_piece_is_refused():
    piece = b"abc"
    check(digest_of(piece), 3, piece)
    with pytest.raises(PacketError, match="was changed on the way"):
        check(digest_of(piece), 3, b"abd")
    with pytest.raises(PacketError, match="came with 2 bytes"):
        check(digest_of(piece), 3, b"ab")


# --- the shelf -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "folder"])
def make_shelf(request, tmp_path):
    return lambda most=100: Shelf(most, folder=None if request.param == "memory" else tmp_path / "shelf")


def put(shelf, *contents):
    for content in contents:
        shelf.put(digest_of(content), content)


def holds(shelf, *contents):
    return [digest_of(content) in shelf for content in contents]


A, B, C = b"a" * 40, b"b" * 40, b"c" * 40


def test_a_shelf_drops_what_was_not_used_for_longest(make_shelf):
    shelf = make_shelf()
    put(shelf, A, B)
    assert shelf.get(digest_of(A)) == A
    put(shelf, C)
    assert holds(shelf, A, B, C) == [True, False, True]
    assert (shelf.nbytes, len(shelf)) == (80, 2)
    assert shelf.get(digest_of(B)) is None


def test_a_piece_larger_than_the_shelf_is_not_kept(make_shelf):
    shelf = make_shelf(60)
    put(shelf, A, b"d" * 61)
    assert holds(shelf, A, b"d" * 61) == [True, False]


def test_a_shelf_keeps_a_copy():
    shelf, content = Shelf(), bytearray(b"abc")
    shelf.put(digest_of(b"abc"), memoryview(content))
    content[0] = 0
    assert shelf.get(digest_of(b"abc")) == b"abc"


def test_a_folder_is_there_for_the_next_process(tmp_path):
    put(Shelf(100, tmp_path / "shelf"), A, B)
    (tmp_path / "shelf" / (digest_of(C) + ".partial")).write_bytes(b"c")
    again = Shelf(100, tmp_path / "shelf")
    assert again.get(digest_of(A)) == A
    assert again.nbytes == 80
    assert sorted(os.listdir(tmp_path / "shelf")) == sorted(map(digest_of, (A, B)))
    for content, at in ((A, 20), (B, 10)):
        os.utime(tmp_path / "shelf" / digest_of(content), (at, at))
    assert holds(Shelf(50, tmp_path / "shelf"), A, B) == [True, False]


def test_a_damaged_file_counts_as_none(tmp_path):
    shelf = Shelf(100, tmp_path)
    put(shelf, A)
    (tmp_path / digest_of(A)).write_bytes(b"a" * 39 + b"b")
    assert shelf.get(digest_of(A)) is None
    assert digest_of(A) not in shelf
    assert shelf.nbytes == 0


def test_a_shelf_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="a shelf for -1 bytes"):
        Shelf(-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"shelf .*file"):
        Shelf(1, tmp_path / "file")


def test_a_folder_that_is_gone_keeps_nothing_and_says_no_more(tmp_path):
    shelf = Shelf(100, tmp_path / "shelf")
    (tmp_path / "shelf").rmdir()
    put(shelf, A)
    assert holds(shelf, A) == [False]


# --- the deal --------------------------------------------------------------------------------------------------------

SIZES = dict.fromkeys("abcdefgh", 10)


def test_donors_have_equal_shares_and_what_one_alone_has_is_asked_of_it_first():
    deal = Deal(SIZES, {name: [0] if name == "h" else [0, 1] for name in SIZES})
    assert deal.take(0, 1000) == ["h", "a", "b", "c"]
    assert deal.take(1, 20) == ["d", "e"]
    assert deal.take(1, 1000, 1) == ["f"]
    assert deal.take(1, 1) == ["g"]
    assert deal.take(0, 1000) == deal.take(1, 1000) == []


def test_what_came_damaged_is_asked_of_another_and_given_up_at_the_third_time():
    deal, error = Deal({"a": 1}, {"a": [0, 1]}), PacketError("damaged")
    assert deal.take(0, 9) == ["a"]
    deal.failed(0, "a", error)
    assert deal.take(0, 9) == []
    assert deal.take(1, 9) == ["a"]
    deal.failed(1, "a", error)
    assert deal.take(0, 9) == ["a"]
    with pytest.raises(PacketError, match="damaged"):
        deal.failed(0, "a", error)


def test_what_a_donor_lacks_is_asked_of_others_as_often_as_it_takes():
    deal = Deal({"a": 1, "b": 1}, {"a": [0, 1], "b": [0]})
    assert deal.take(0, 9) == ["b"]
    deal.gone(0, ["b"])
    assert deal.orphans == ["b"]
    assert deal.take(1, 9) == ["a"]
    deal.lacks(1, "a")
    assert deal.orphans == deal.missing == ["a", "b"]
