"""The log is the model: its bytes, what is refused, and weights rebuilt from it."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import random
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from seed_samples import RECIPE, begun, frozen, grown, lived, tuned

from thinwire.errors import ConfigError, PacketError, StateMismatch
from thinwire.seeds import rebuild
from thinwire.seeds.digests import Digest, digest
from thinwire.seeds.log import Closed, Log, updates
from thinwire.seeds.reading import Reader, signed, varint
from thinwire.seeds.recipe import Recipe
from thinwire.seeds.seal import MAGIC, is_signed, key_of
from thinwire.seeds.sums import Sums
from thinwire.seeds.updates import Update

TESTS = Path(__file__).parents[1]
KEY, OTHER = key_of(b"the team's own key"), key_of(b"a key of somebody else")


def _renew() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_renew_log", TESTS / "golden" / "renew.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = _renew()

members = st.integers(0, 2**64 - 1)
lrs = st.floats(0, 2.0**100, allow_nan=False, width=32)
closed_rounds = st.builds(
    Closed,
    number=st.integers(0, 2**64 - 1),
    lr=lrs,
    codes=st.dictionaries(members, st.binary(max_size=5), max_size=4),
    joined=st.lists(members, max_size=3).map(tuple),
    left=st.lists(members, max_size=3).map(tuple),
)


@st.composite
def logs(draw) -> Log:
    """Logs with members that come, go and are missing now and then."""
    samples, code = draw(st.integers(1, 3)), draw(st.sampled_from(["byte", "half", "whole"]))
    log = Log.of(tuned().items(), Recipe(samples=samples, code=code))
    few = st.sampled_from([0, 1, 5, 300, 2**64 - 1])
    for number in range(draw(st.integers(0, 6))):
        told = {m: draw(st.binary(min_size=log.recipe.width, max_size=log.recipe.width)) for m in draw(st.sets(few))}
        lr = draw(st.sampled_from([0.0, 0.5, 1e-4]))
        log = log.append(Closed(number, lr, told, tuple(draw(st.sets(few))), tuple(draw(st.sets(few)))))
    return log.checked("0" * 32) if draw(st.booleans()) else log


# A closed round ------------------------------------------------------------------------------------------------------


@given(closed_rounds)
def test_a_closed_round_is_read_as_it_was_written(closed):
    assert Closed.from_bytes(closed.to_bytes()) == closed


def test_a_closed_round_is_small():
    """4 members of 4 scalars: 16 bytes of them, one for each member, and 13."""
    assert len(Closed(9, 1e-4, {member: bytes(4) for member in range(4)}).to_bytes()) == 16 + 4 + 13
    written = Closed(2, 0.5, {7: b"\1\2", 0: b"\3\4"}, joined=(7,)).to_bytes()
    assert written.hex(" ") == "02 00 00 00 3f 02 03 00 06 03 04 01 02 01 07 00 " + "46 89 01 0b"


def test_members_are_in_order_and_learning_rates_are_float32():
    closed = Closed(0, 0.1, {5: b"a", 2: b"b"}, joined=(5, 2, 5), left=(9, 1))
    assert (closed.members, closed.joined, closed.left) == ((2, 5), (2, 5), (1, 9))
    assert closed.lr == 0.10000000149011612


@pytest.mark.parametrize("lr", [math.nan, math.inf, -0.5])
def test_a_learning_rate_that_is_none(lr):
    with pytest.raises(ConfigError, match=f"round 3 with a learning rate of {lr}"):
        Closed(3, lr, {})


def sealed(body: bytes) -> bytes:
    """With a checksum that fits."""
    return body + struct.pack("<I", zlib.crc32(body))


@given(st.binary(max_size=40), st.booleans())
def test_any_bytes_are_a_closed_round_or_a_packet_error(data, fits):
    data = sealed(data) if fits else data
    try:
        closed = Closed.from_bytes(data)
    except PacketError:
        return
    assert closed.to_bytes() == data


@given(closed_rounds, st.data())
def test_a_closed_round_with_a_bit_changed_or_cut_short_is_refused(closed, data):
    written = bytearray(closed.to_bytes())
    with pytest.raises(PacketError):
        Closed.from_bytes(bytes(written[: data.draw(st.integers(0, len(written) - 1))]))
    bit = data.draw(st.integers(0, 8 * len(written) - 1))
    written[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PacketError):
        Closed.from_bytes(bytes(written))


HEAD = b"\0" + struct.pack("<f", 0.5)


@pytest.mark.parametrize(
    ("data", "said", "offset"),
    [
        (b"", "the checksum of a closed round does not match", 0),
        (sealed(b""), "a closed round ends where 1 more bytes are due and 0 are left", 0),
        (sealed(b"\0" + struct.pack("<f", -1.0)), "a closed round has a learning rate of -1.0", 5),
        (sealed(b"\0" + struct.pack("<f", math.nan)), "a closed round has a learning rate of nan", 5),
        (sealed(HEAD + b"\xff\xff\x03"), "a closed round ends where 1 more bytes are due", 8),
        (sealed(HEAD + b"\xff\xff\x03\x02"), "a closed round ends where 65535 numbers are due and 0 bytes are left", 9),
        (sealed(HEAD + b"\x02\0" + b"\0\0" + b"\1\1" + b"ab" + b"\0\0"), "does not write sizes as short as it can", 11),
        (sealed(HEAD + b"\0\1\0\0"), "does not write sizes as short as it can", 7),
        (sealed(HEAD + b"\x80\0"), "a number that is not written as short as it can be", 7),
        (sealed(HEAD + b"\xff" * 10), "a closed round has a number of more than 64 bits", 15),
        (sealed(HEAD + b"\xff" * 9 + b"\2"), "or of more than 64 bits", 15),
        (sealed(HEAD + b"\2\1" + b"\xff" * 9 + b"\1" + b"\0"), "names member 18446744073709551616", 18),
        (sealed(HEAD + b"\0\0\0\0\0"), "a closed round has 1 bytes too many", 9),
    ],
)
def test_what_is_wrong_with_a_closed_round(data, said, offset):
    with pytest.raises(PacketError, match=re.escape(said)) as caught:
        Closed.from_bytes(data)
    assert caught.value.offset == offset


@given(st.integers(-(2**63), 2**63 - 1))
def test_signed_numbers(number):
    reader = Reader(signed(number), what="a number")
    assert reader.signed() == number
    reader.end()


# The file ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(logs(), st.sampled_from([None, KEY]))
def test_a_log_is_read_as_it_was_written(log, key):
    data = log.to_bytes(key)
    assert Log.from_bytes(data) == Log.from_bytes(data, key) == log
    assert is_signed(data) == (key is not None)


def test_golden_bytes():
    data = golden.log_path().read_bytes()
    log = Log.from_bytes(data, golden.LOG_KEY)
    assert log == golden.log()
    assert log.result == "fedcba9876543210fedcba9876543210"
    # Versions of zstd may write other bytes for the same content, and all read each other's.
    assert zstandard.ZstdDecompressor().decompress(data[80:]) == golden.log().content()
    assert all(zstandard.get_frame_parameters(each[80:]).has_checksum for each in (data, golden.log().to_bytes()))
    assert data[:8].hex() == "5457534c01000100"


def test_golden_updates():
    """What the golden log's scalars come to, by the recipe: numbers that are not to change either."""
    found = list(updates(golden.log()))
    assert [len(update.seeds) for update in found] == [4, 10, 14, 14]
    assert [update.keep for update in found] == [0.875, 0.875, 0.9375, 0.96875]
    told = hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()
    assert told == "233d5f34a1de410f", found


def test_a_thousand_rounds_of_four_members_of_four_scalars():
    """16000 bytes of scalars; normal ones are squeezed to 7 bits each, and a linear schedule to 200 bytes."""
    log = grown(Log.of(tuned().items(), Recipe(samples=4)), 1000, members=4)
    assert len(log.to_bytes()) < 14_500
    rounds = tuple(replace(closed, lr=1e-4 * (1 - closed.number / 1000)) for closed in log.rounds)
    assert len(replace(log, rounds=rounds).to_bytes()) < 14_500


def test_what_does_not_change_takes_nothing():
    log = begun()
    small = replace(log, rounds=tuple(Closed(number, 0.5, {0: b"\1\2", 900: b"\3\4"}) for number in range(2000)))
    assert len(small.to_bytes()) < len(log.to_bytes()) + 60


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_log_with_any_bit_changed_is_refused(data):
    whole = bytearray(golden.log_path().read_bytes())
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    for key in (None, golden.LOG_KEY):
        with pytest.raises(PacketError):
            Log.from_bytes(bytes(whole), key)


def test_a_log_cut_short_anywhere_is_refused():
    whole = golden.log_path().read_bytes()
    for length in range(len(whole)):
        with pytest.raises(PacketError):
            Log.from_bytes(whole[:length])
    with pytest.raises(PacketError, match=f"the log says it has {len(whole)} bytes, and {len(whole) + 1} are here"):
        Log.from_bytes(whole + b"\0")


def packed(content: bytes, *, frame: bytes | None = None, flags: int = 0, signed: bytes = bytes(32)) -> bytes:
    """A file with this content, its digest as it should be."""
    frame = zstandard.ZstdCompressor().compress(content) if frame is None else frame
    start = struct.pack("<4sHHQ", MAGIC, 1, flags, 80 + len(frame))
    plain = hashlib.blake2b(start + signed + frame, digest_size=32, person=b"thinwire log").digest()
    return start + plain + signed + frame


CONTENT = golden.log().content()
WORDS = CONTENT.index(b"{")  # the header's JSON begins here
COLUMNS = CONTENT.rindex(b"}") + 1


def with_header(old: str, new: str) -> bytes:
    words = CONTENT[WORDS:COLUMNS].decode()
    assert old in words
    changed = words.replace(old, new).encode()
    return varint(len(changed)) + changed + CONTENT[COLUMNS:]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_bytes_are_a_log_or_a_packet_error(data):
    """As they are, as a frame, as content, as columns, or a golden log's with some of it changed; all digests fit."""
    junk = data.draw(st.binary(max_size=60))
    at = data.draw(st.integers(0, len(CONTENT)))
    for whole in (
        junk,
        packed(b"", frame=junk),
        packed(junk),
        packed(CONTENT[:COLUMNS] + junk),
        packed(CONTENT[:at] + junk + CONTENT[at + len(junk) :]),
    ):
        try:
            log = Log.from_bytes(whole)
        except PacketError:
            continue
        assert Log.from_bytes(log.to_bytes()) == log


POOL = replace(golden.log(), rounds=(), checks={}, sums=Sums(5, (1, -2, 300, 0)), recipe=Recipe()).content()
NO_SIZE = zstandard.ZstdCompressor(write_content_size=False).compress(CONTENT)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"TWSL", "only 4 bytes, and a log's header has 80 (at byte 4)\n  expected  a log of seeds, whole"),
        (b"PK\3\4" + bytes(99), "the first bytes are b'PK\\x03\\x04', not b'TWSL': this is no log of seeds (at"),
        (b"TWSL\2" + bytes(99), "a log of format 2 (at byte 4)\n  expected  format 1\n  mend      read it with"),
        (packed(CONTENT, flags=2), "a log with unknown flags 0x0002"),
        (packed(CONTENT, signed=b"x" * 32), "or a signature that they deny"),
        (packed(CONTENT)[:-1] + b"x", "the log's digest does not match: bytes of it were changed (at byte 16)"),
        (packed(b"", frame=b"junk"), "the log cannot be unpacked"),
        (packed(b"", frame=NO_SIZE), "a log that says its content has -1 bytes (at byte 80)"),
        (packed(b"\x05[1,2]"), "the log's content begins with a header that is not of recipe, tensors"),
        (packed(b"\x05[1,2"), "the log's content ends where 5 more bytes are due"),
        (packed(b"\x03nan"), "the log's content does not begin with JSON"),
        (packed(b"\x03NaN"), "NaN is no number"),
        (packed(b"\x04\xff\xfe{}"), "the log's content does not begin with JSON"),
        (packed(with_header('"pool":null', '"pool":{"seed":1}')), "has a header whose pool is \"{'seed': 1}\""),
        (packed(with_header('"pool":null', '"pool":{"seed":1,"bits":64}')), "has a header whose pool is"),
        (packed(with_header('"pool":null', '"pool":{"seed":1,"bits":24}')), "bytes too many"),
        (packed(POOL[:-6] + b"\1" + varint(2**64 - 1)), "the log's a sum of 9223372036854775808 in a pool"),
        (packed(POOL[:-6] + b"\4"), "the log's content ends where 4 numbers are due and 0 bytes are left"),
        (packed(with_header('"out.weight"', '"\\ud800"')), "does not begin with JSON"),
        (packed(with_header('[2,3]', '[2,-3]')), "has a header whose tensors is"),
        (packed(with_header('["float32",[2,3]]', '["float32"]')), "has a header whose tensors is"),
        (packed(with_header('00112233', '0011223')), "has a header whose base is"),
        (packed(with_header('"2":"01', '"02":"01')), "has a header whose checks is"),
        (packed(with_header('"2":"01', '"5":"01')), "has a digest of round 5 and 4 rounds"),
        (packed(with_header(':"h.weight"', ':"h.height"')), "a second name for a tensor that was not tuned"),
        (packed(with_header('"samples":2', '"samples":0')), "the log's recipe: samples=0"),
        (packed(with_header('"samples":2', '"samples":3')), "the log's content ends where"),
        (packed(with_header('"samples":2', '"samples":1')), "bytes too many"),
        (packed(with_header('"samples"', '"sample"')), "the log's a recipe with 'sample'"),
        (packed(CONTENT[:COLUMNS] + b"\1\x10"), "has rounds with unknown flags, or without a learning rate"),
        (packed(CONTENT[:COLUMNS] + b"\1\0"), "has rounds with unknown flags, or without a learning rate"),
        (packed(CONTENT[:COLUMNS] + b"\1\3" + bytes(4) + b"\0"), "has a change of members that changes none"),
        (packed(CONTENT[:COLUMNS] + b"\1\1" + signed(0x7F800000)), "a learning rate that is negative or not"),
        (packed(CONTENT[:COLUMNS] + varint(2**60)), f"ends where {2**60} more bytes are due"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_log(data, said):
    with pytest.raises(PacketError, match=re.escape(said)):
        Log.from_bytes(data)


def test_a_log_that_unpacks_to_too_much_is_not_opened():
    bomb = zstandard.ZstdCompressor().compress(bytes((1 << 28) + 1))
    with pytest.raises(PacketError, match=f"a log that says its content has {(1 << 28) + 1} bytes"):
        Log.from_bytes(packed(b"", frame=bomb))


# A pool --------------------------------------------------------------------------------------------------------------


def test_a_pool_is_one_step_from_the_base():
    sums = Sums(5, (0,) * 6, bits=24).added({4: -(1 << 23), 1: 3}).added({1: (1 << 24) - 3, 2: 7}).added({2: -7})
    log = replace(begun(), sums=sums)
    assert list(updates(log)) == [Update((sums.direction(1), sums.direction(4)), (1.0, -0.5))]
    assert Log.from_bytes(log.to_bytes()) == log
    model, other = tuned() | frozen(), tuned() | frozen()
    rebuild.rebuild(model, log)
    rebuild.apply([(name, other[name]) for name in log.tensors], list(updates(log)), RECIPE)
    assert same(model, other)
    assert not same(model, tuned() | frozen())


def test_a_pool_of_4096_directions_is_less_than_18_kilobytes():
    drawn = random.Random(3)
    sums = Sums(1, tuple(round(drawn.gauss(0, 1e-6) * 2**40) for _ in range(4096)))
    assert len(replace(begun(), sums=sums).to_bytes()) < 14_000


def test_sums_are_free_of_order_and_have_an_end():
    drawn = random.Random(4)
    told = [{drawn.randrange(9): drawn.randrange(-(2**40), 2**40)} for _ in range(50)]
    one, other = Sums(1, (0,) * 9), Sums(1, (0,) * 9)
    for each in told:
        one = one.added(each)
    for each in reversed(told):
        other = other.added(each)
    assert one == other
    with pytest.raises(ConfigError, match="a sum of 9223372036854775808 in a pool of directions"):
        Sums(1, (2**63 - 1,)).added({0: 1})


# Who wrote it --------------------------------------------------------------------------------------------------------


def test_a_key_proves_who_wrote_it():
    log = begun()
    assert Log.from_bytes(log.to_bytes(KEY), KEY) == Log.from_bytes(log.to_bytes(KEY)) == log
    with pytest.raises(ConfigError, match="the log was signed with another key"):
        Log.from_bytes(log.to_bytes(OTHER), KEY)
    with pytest.raises(ConfigError, match="the log is not signed\n  expected  a log with a keyed digest"):
        Log.from_bytes(log.to_bytes(), KEY)


def test_somebody_without_the_key_cannot_change_a_signed_log():
    """They can make the plain digest fit, and not the keyed one."""
    mine = begun().to_bytes(KEY)
    theirs = packed(grown(begun(), 1).content(), flags=1, signed=mine[48:80])
    assert len(Log.from_bytes(theirs).rounds) == 1
    with pytest.raises(ConfigError, match="the log was signed with another key"):
        Log.from_bytes(theirs, KEY)


def test_a_key_that_can_be_guessed():
    with pytest.raises(ConfigError, match="a key of 15 bytes\n  expected  16 bytes or more"):
        key_of(bytes(15))


# Growing and going on ------------------------------------------------------------------------------------------------


def test_rounds_come_in_order_and_as_the_recipe_has_them():
    log = grown(begun(), 3)
    for number in (2, 4):
        with pytest.raises(ConfigError, match=f"round {number} in a log of 3 rounds\n  expected  round 3"):
            log.append(Closed(number, 0.1, {}))
    with pytest.raises(ConfigError, match="member 1 said 3 bytes in round 3\n  expected  2 bytes"):
        log.append(Closed(3, 0.1, {1: bytes(3)}))


def test_what_is_remembered_follows_from_the_log():
    """A member that comes late, or resumes, has the state of those who were there; to the bit, over a file."""
    log = grown(begun(), 9)
    state = RECIPE.start()
    for closed in log.rounds:
        state, _ = RECIPE.step(state, closed)
    assert Log.from_bytes(log.to_bytes()).state == state
    assert [before for before, _ in log.states()][4] == replace(log, rounds=log.rounds[:4]).state
    assert list(updates(log))[:5] == list(updates(replace(log, rounds=log.rounds[:5])))


def test_a_log_is_of_one_recipe_and_model():
    log = begun()
    log.check(tuned().items(), RECIPE)
    with pytest.raises(ConfigError, match="the log has samples=2\n  expected  samples=3, as the run"):
        log.check(tuned().items(), replace(RECIPE, samples=3))
    model = tuned()
    del model["embed.weight"]
    with pytest.raises(ConfigError, match=r"the model has no tensor 'embed.weight'"):
        log.check(model.items(), RECIPE)
    model["embed.weight"] = torch.zeros(4, 5)
    with pytest.raises(
        ConfigError, match=r"the model has 'embed.weight' as float32 \[4, 5\]\n  expected  'embed.weight'"
    ):
        log.check(model.items(), RECIPE)


# Digests -------------------------------------------------------------------------------------------------------------


def test_a_digest_is_of_names_shapes_dtypes_and_bytes_and_not_of_the_order():
    model = {"a": torch.arange(6.0), "b": torch.zeros(2, 2)}
    others = [
        {**model, "a": torch.arange(6.0).view(2, 3)},
        {**model, "a": torch.arange(6.0).view(torch.int32)},
        {**model, "a": torch.arange(6.0) + 1},
        {"a": model["a"], "c": model["b"]},
        {"a": model["a"]},
        {},
    ]
    strided = {"b": torch.zeros(4, 4)[::2, ::2], "a": model["a"]}
    assert digest(model.items()) == digest(strided.items())
    assert len({digest(each.items()) for each in [model, *others]}) == 7
    assert digest(model.items()) == "124c0fd42e7cfb8df566f6f1b04ea3fe"  # it is written in logs


def test_tensors_come_in_ascending_order():
    state = Digest()
    state.add("b", torch.zeros(1))
    with pytest.raises(AssertionError):
        state.add("a", torch.zeros(1))


# Rebuilding ----------------------------------------------------------------------------------------------------------


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def run():
    """A run of seven rounds: its log and the weights that a member ended with."""
    return lived(7)


@pytest.fixture
def base(tmp_path):
    """The base as a file: what was tuned, what was not, a tied tensor twice, and one that nobody spoke of."""
    tensors = {**tuned(), **frozen(), "out.weight": tuned()["embed.weight"], "extra": torch.ones(7, dtype=torch.int8)}
    save_file(tensors, tmp_path / "base.safetensors", {"format": "pt"})
    return tmp_path / "base.safetensors"


def test_a_member_that_replays_holds_what_others_hold(run):
    log, lived_through = run
    model = {**tuned(), **frozen()}
    rebuild.rebuild(model, Log.from_bytes(log.to_bytes()))
    assert same({name: model[name] for name in lived_through}, lived_through)
    assert same({name: model[name] for name in frozen()}, frozen())


def test_from_file_to_file(run, base, tmp_path):
    log, lived_through = run
    out = tmp_path / "tuned.safetensors"
    assert rebuild.rebuild_file(log, base, out) == log.result == digest(lived_through.items())
    found = load_file(out)
    assert same({name: found.pop(name) for name in lived_through}, lived_through)
    assert torch.equal(found.pop("out.weight"), lived_through["embed.weight"])
    assert torch.equal(found.pop("extra"), torch.ones(7, dtype=torch.int8))
    assert same(found, frozen())
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "tuned.safetensors"]


def test_tensors_are_held_a_few_at_a_time(run, base, tmp_path, monkeypatch):
    """With room for nothing they come one by one; the digests, of a rebuild and of an audit, are the same."""
    together, held = rebuild.apply, []
    monkeypatch.setattr(rebuild, "apply", lambda pairs, *rest: held.append(len(pairs)) or together(pairs, *rest))
    for room, due in ((0, [1] * 4), (150, [3, 1]), (1 << 26, [4])):
        held.clear()
        monkeypatch.setattr(rebuild, "_TOGETHER", room)
        rebuild.rebuild_file(run[0], base, tmp_path / "out")
        assert held == due
        assert all(check.found == check.noted for check in rebuild.audit(tuned() | frozen(), run[0]))


def test_a_base_may_be_a_folder_and_hold_a_tied_tensor_under_its_other_name(run, tmp_path):
    log, lived_through = run
    tensors = {**tuned(), **frozen()}
    tensors["out.weight"] = tensors.pop("embed.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    rebuild.rebuild_file(log, tmp_path, tmp_path / "tuned.safetensors")
    assert torch.equal(load_file(tmp_path / "tuned.safetensors")["out.weight"], lived_through["embed.weight"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers.0.bias": torch.zeros(6)}, "the base is another one: the digest of its tuned tensors is "),
        ({"mean": torch.zeros(3, dtype=torch.int64)}, "the base is another one: the digest of its frozen tensors is "),
        ({"layers.0.bias": None}, "the base has no tensor 'layers.0.bias'\n  expected  'layers.0.bias' as float32 [6]"),
        ({"mean": None}, "the base has no tensor 'mean'"),
        ({"layers.1.weight": torch.zeros(6, 4)}, "the base has 'layers.1.weight' as float32 [6, 4]\n  expected  'la"),
        ({"layers.0.weight": torch.zeros(6, 4)}, "the base has 'layers.0.weight' as float32 [6, 4]\n  expected  'la"),
    ],
)  # fmt: skip
def test_another_base_is_refused_before_anything_is_written(run, tmp_path, change, said):
    log, _ = run
    tensors = {name: each for name, each in {**tuned(), **frozen(), **change}.items() if each is not None}
    save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        rebuild.rebuild_file(log, tmp_path / "base.safetensors", tmp_path / "out")
    if "digest" in said:
        assert caught.value.expected.split()[1].strip(",") in (log.base, log.rest)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=re.escape(said)):
        rebuild.rebuild(tensors, log)
    untouched = {name: each for name, each in {**tuned(), **frozen()}.items() if name not in change}
    assert same({name: tensors[name] for name in untouched}, untouched)


def test_another_result_is_refused_and_nothing_is_left(run, base, tmp_path):
    log = replace(run[0], checks={7: "0" * 32})
    with pytest.raises(StateMismatch, match=f"from 7 rounds has the digest {run[0].result}\n  expected  digest 0000"):
        rebuild.rebuild_file(log, base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors"]
    with pytest.raises(StateMismatch):
        rebuild.rebuild(tuned() | frozen(), log)
    rebuild.rebuild_file(replace(log, checks={}), base, tmp_path / "out")  # a log that has none is taken at its word


def test_the_base_is_not_written_over(run, base):
    before = base.read_bytes()
    with pytest.raises(ConfigError, match="is the base itself"):
        rebuild.rebuild_file(run[0], base, base)
    assert base.read_bytes() == before


def test_what_is_no_base(run, tmp_path):
    (tmp_path / "junk").write_bytes(b"junk")
    for path in ("junk", "nothing", "."):
        with pytest.raises(ConfigError, match="expected  weights as a safetensors file, or a folder"):
            rebuild.rebuild_file(run[0], tmp_path / path, tmp_path / "out")


def test_an_audit_says_where_a_run_and_its_log_part(run):
    log, _ = run
    model = tuned() | frozen()
    checks = rebuild.audit(model, log)
    assert [check.rounds for check in checks] == [2, 4, 6, 7]
    assert all(check.found == check.noted for check in checks)
    assert same(model, tuned() | frozen())
    rounds = list(log.rounds)
    rounds[4] = replace(rounds[4], codes={**rounds[4].codes, 1: b"\x45\x45"})
    found = rebuild.audit(model, replace(log, rounds=tuple(rounds)))
    assert [check.found == check.noted for check in found] == [True, True, False, False]


def test_rounds_in_any_number_of_pieces_come_to_the_same(run):
    """A joiner gets the log up to a round, then rounds as they close."""
    log, lived_through = run
    for cut in (0, 3, 7):
        model = tuned() | frozen()
        rebuild.rebuild(model, replace(log, rounds=log.rounds[:cut], checks={}))
        rebuild.apply([(name, model[name]) for name in log.tensors], list(updates(log))[cut:], RECIPE)
        assert same({name: model[name] for name in lived_through}, lived_through)
