"""Top-k against a sort, its ties, scopes and indices, and what its decoder refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thinwire.codecs import TopK, indices, int8, parse, selection, topk, warmup_shares, zstd
from thinwire.codecs.indices import INDEX
from thinwire.errors import ConfigError, PacketError

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def kept(codec: TopK, x: Tensor) -> list[int]:
    """Positions that are sent, and that the values are theirs."""
    fields = codec.encode(x, 0)
    p = indices.read(codec.index, fields["index"], len(fields["value"]), len(x))
    assert torch.equal(fields["value"], x[p])
    return [int(i) for i in p]


def ordered(x: Tensor, k: int) -> list[int]:
    """The definition: the k largest magnitudes, of equals those of lower index."""
    bits = (x.view(torch.int32) & 0x7FFFFFFF).tolist()
    return sorted(sorted(range(len(x)), key=lambda i: (-bits[i], i))[:k])


@given(st.lists(FLOATS, min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_the_kept_are_the_largest_and_of_equals_the_first(values: list[float], share: float) -> None:
    x = torch.tensor(values)
    codec = topk(share, index="int32")
    assert kept(codec, x) == ordered(x, codec.layout(len(x))["value"][1])


def _data(n: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(n, generator=g)
    return {
        "normal": normal,
        "heavy tails": (3 * normal).exp(),
        "coarse": normal.mul(4).round(),  # many equals
        "few": torch.where(torch.rand(n, generator=g) < 0.002, normal, 0.0),  # fewer than are to be sent
        "zeros": torch.zeros(n),
        "equal": torch.full((n,), -3e38),
        "denormal": normal * 1e-41,
        "huge": normal.clamp(-3, 3) * 1e38,
        "rising": torch.arange(n).float(),
        "hidden": torch.where(torch.arange(n) % 2 == 0, 0.0, normal),
        "in front": torch.cat([normal[: n // 50] * 9, normal[n // 50 :]]),
    }


@pytest.mark.parametrize("name", _data(1))
def test_long_vectors_are_exact_too(name: str) -> None:
    """Beyond 2^14 elements a sample tells where to look; what it tells must not matter."""
    x = _data(20_011)[name]
    for share in (1e-4, 0.01, 1 / 9, 0.3):
        codec = topk(share)
        assert kept(codec, x) == ordered(x, codec.layout(len(x))["value"][1])


@pytest.mark.parametrize("factor", [1000, 0.001])
def test_a_sample_that_misleads_does_no_harm(factor: float) -> None:
    """Every 17th element is looked at first; here these alone are large, fewer than are to be sent, or small."""
    x = torch.rand(1 << 15, generator=torch.Generator().manual_seed(0))
    x[::17] *= factor
    assert kept(topk(0.1), x) == ordered(x, 3277)


def test_a_sample_spares_work() -> None:
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    assert 2622 <= len(selection._candidates(x, 2622)) < 4200
    assert selection._candidates(x, 1 << 16) is None  # too many to be worth it


def test_everything_is_kept_at_full_rate() -> None:
    x = torch.randn(100)
    for codec in (topk(1), topk(1, index="int32"), topk(1, block=7), topk(1, index="smallest")):
        assert torch.equal(codec.decode(codec.encode(x, 0), 100, 0), x)
    assert list(topk(1).layout(100)) == ["value"]


def test_a_larger_share_keeps_more() -> None:
    assert [topk(s).layout(1000)["value"][1] for s in (1e-9, 1 / 64, 0.5, 1)] == [1, 16, 500, 1000]


@pytest.mark.parametrize("index", INDEX)
def test_every_index_says_the_same(index: str) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    codec, plain = TopK(1 / 50, index=index), topk(1 / 50, index="int32")  # type: ignore[arg-type]
    assert torch.equal(codec.decode(codec.encode(x, 0), 5000, 0), plain.decode(plain.encode(x, 0), 5000, 0))
    chain = codec | int8
    assert torch.equal(
        chain.decode(chain.encode(x, 0), 5000, 0), (plain | int8).decode((plain | int8).encode(x, 0), 5000, 0)
    )


def test_what_an_entry_costs() -> None:
    """n = 1 000 003 at 1 % with int8 values: 10 001 codes, 40 scales, 10 705 bytes of positions."""
    sizes = (topk(0.01) | int8).layout(1_000_003)
    assert {name: size for name, (_, size) in sizes.items()} == {
        "value.scale": 40,
        "value.code": 10_001,
        "index": 10_705,
    }
    assert topk(0.01, index="int32").layout(1_000_003)["index"] == (torch.int32, 10_001)


# Blocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
def test_each_block_keeps_its_own(n: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).mul(3).round()
    codec = topk(0.1, block=64)
    expected = []
    for start in range(0, n, 64):
        part = x[start : start + 64]
        expected += [start + i for i in ordered(part, -(-len(part) // 10))]
    if n > 1:
        assert kept(codec, x) == expected
    assert codec.layout(n)["value"][1] == len(expected)


def test_a_block_as_long_as_the_vector_is_the_vector() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert kept(topk(0.05, block=1000), x) == kept(topk(0.05), x)
    assert kept(topk(0.05, block=100), x) != kept(topk(0.05), x)


def test_blocks_larger_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinwire.codecs import blocks

    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    whole = kept(topk(0.05, block=64), x)
    monkeypatch.setitem(blocks._PIECE, "cpu", 128)
    assert kept(topk(0.05, block=64), x) == whole
    monkeypatch.setattr(selection, "_PIECE", 100)
    y = torch.randn(1 << 15, generator=torch.Generator().manual_seed(0))
    assert kept(topk(0.01), y) == ordered(y, 328)


def test_positions_that_crowd_in_one_block_are_refused() -> None:
    fields = topk(0.25, index="int32").encode(torch.tensor([4.0, 3, 0, 0, 2, 0, 0, 1]), 0)
    assert topk(0.25, index="int32").decode(fields, 8, 0).tolist() == [4, 3, 0, 0, 0, 0, 0, 0]
    with pytest.raises(PacketError, match="'index' does not have as many positions in each block as are kept of it"):
        topk(0.25, index="int32", block=4).decode(fields, 8, 0)


def test_contraction_is_that_of_the_worst_block() -> None:
    assert topk(0.1).contraction(1000) == 0.1
    assert topk(0.1, block=64).contraction(128) == 7 / 64
    assert topk(0.1, block=64).contraction(128 + 20) == 2 / 20
    assert topk(0.1, block=64).contraction(20) == 2 / 20


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [[1, 1], [2, 1], [-1, 3], [3, 4], [0, 2**31 - 1]])
def test_positions_that_no_encoder_writes_are_refused(index: list[int]) -> None:
    fields = {"value": torch.ones(2), "index": torch.tensor(index, dtype=torch.int32)}
    with pytest.raises(PacketError, match=r"'index' is not a list of ascending positions\n  expected  .* below 4"):
        topk(0.5, index="int32").decode(fields, 4, 0)


def test_fewer_values_than_are_due_are_refused_where_the_index_varies() -> None:
    codec = topk(0.5, index="smallest")
    fields = dict(codec.encode(torch.arange(8.0), 0))
    fields["value"] = fields["value"][:3]
    with pytest.raises(PacketError, match=r"field 'value' is torch.float32 \[3\]\n  expected  torch.float32 \[4\]"):
        codec.decode(fields, 8, 0)


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), "1/64", True, None])
def test_shares_out_of_range_are_refused(share: object) -> None:
    with pytest.raises(
        ConfigError, match=r"topk is to keep a share of .*\n  expected  a number in \(0, 1\]: the share"
    ):
        TopK(share)  # type: ignore[arg-type]


def test_other_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"topk is to write its positions as 'best'\n  expected  one of compact, sma"):
        topk(0.1, index="best")  # type: ignore[arg-type]
    for block in (0, -1, 2.5, True, "64"):
        with pytest.raises(ConfigError, match=r"topk is to count in blocks of .*\n  expected  a whole number of entri"):
            topk(0.1, block=block)  # type: ignore[arg-type]


def test_vectors_beyond_int32_are_refused_before_anything_is_computed() -> None:
    x = torch.zeros(1).expand(2**31)  # no memory behind it
    with pytest.raises(ConfigError, match=r"topk of a vector of 2147483648 elements\n  expected  fewer than 2\^31"):
        topk(0.5, index="int32").encode(x, 0)


def test_vectors_beyond_int32_are_right_with_the_other_indices() -> None:
    n = 2**33 + 5
    assert topk(2**-20).layout(n) == {"value": (torch.float32, 8193), "index": (torch.uint8, -(-8193 * 19 // 8) + 3073)}
    codec = topk(2**-32)  # three of 2^33 and a bit
    p = torch.tensor([7, 2**32, 2**33 + 4])
    field = indices.write("compact", p, n)
    assert codec.layout(n)["index"] == (torch.uint8, len(field))
    assert torch.equal(indices.read("compact", field, 3, n), p)


def test_expressions() -> None:
    assert parse("topk(1/64, index='varint', block=4096)") == topk(1 / 64, index="varint", block=4096)
    assert topk(1 / 64, index="varint", block=4096).spec == "topk(0.015625, index='varint', block=4096)"
    assert topk(1 / 64, index="compact").spec == "topk(0.015625)"
    assert (topk(1 / 64) | zstd).spec == "topk(0.015625) | zstd"


# Warm-up --------------------------------------------------------------------------------------------------------------


def test_shares_while_warming_up() -> None:
    assert [round(share, 4) for share in warmup_shares(0.001, 5)] == [0.3162, 0.1, 0.0316, 0.01, 0.0032]
    assert warmup_shares(0.001, 0) == ()
    assert warmup_shares(1, 3) == (1, 1, 1)
    assert all(a > b > 0.01 for a, b in zip(warmup_shares(0.01, 9), warmup_shares(0.01, 9)[1:], strict=False))


def test_warm_ups_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a warm-up of -1 stages\n  expected  a whole number, at least 0"):
        warmup_shares(0.001, -1)
    with pytest.raises(ConfigError, match="topk is to keep a share of 0"):
        warmup_shares(0, 5)


# Low-rank adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "coder"), [(1 / 2, "bitmap"), (1 / 4, "bitmap"), (1 / 16, "elias_fano")])
def test_one_k_for_all_adapters_together(density: float, coder: str) -> None:
    """FLASC's update (arXiv:2406.05233): the largest of all LoRA factors jointly, so that layers compete.

    At a density of 1/4 a bitmap takes 4 bits an entry, as Elias-Fano does to a bit; at 1/16 it would take 16, not 6.
    """
    g = torch.Generator().manual_seed(0)
    shapes = [(4, 64), (64, 4)] * 6  # factors A and B of six layers
    scales = [2.0**-layer for layer in range(6) for _ in range(2)]
    x = torch.cat(
        [scale * torch.randn(shape, generator=g).view(-1) for shape, scale in zip(shapes, scales, strict=True)]
    )
    codec, n = topk(density), len(x)
    k = int(density * n)
    assert kept(codec, x) == ordered(x, k)
    per_layer = [len([i for i in kept(codec, x) if i // 512 == layer]) for layer in range(6)]
    assert per_layer == sorted(per_layer, reverse=True)
    assert per_layer[0] > 2 * per_layer[5]
    assert indices._compact(k, n) == coder
    assert topk(density).layout(n)["index"] == indices.layout(coder, k, n)
