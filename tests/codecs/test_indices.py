"""Index coders: golden bytes, exact sizes, and refusal of what no encoder writes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thinwire.codecs.indices import INDEX, Index, exact, layout, read, write
from thinwire.errors import PacketError

every_coder = pytest.mark.parametrize("how", INDEX)
FIXED: tuple[Index, ...] = ("packed", "bitmap", "elias_fano")


def positions(*where: int) -> Tensor:
    return torch.tensor(where, dtype=torch.int64)


def raw(data: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(data)), dtype=torch.uint8)


def drawn(k: int, n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(n, k, replace=False)))


@pytest.mark.parametrize(
    ("how", "data"),
    [
        ("elias_fano", "4D E5"),  # highs 0, 1, 1, 3 in unary: bits 0, 2, 3, 6; lows 1, 1, 2, 3
        ("packed", "51 F6"),
        ("bitmap", "62 80"),
        ("varint", "01 03 00 08"),
        ("compact", "51 F6"),
        ("smallest", "00 51 F6"),
    ],
)
def test_golden(how: Index, data: str) -> None:
    p = positions(1, 5, 6, 15)
    assert torch.equal(write(how, p, 16), raw(data))
    assert torch.equal(read(how, raw(data), 4, 16), p)


def test_golden_varints_of_several_bytes() -> None:
    p = positions(127, 128 + 128, 128 + 128 + 1 + 16384)
    data = raw("7F 80 01 80 80 01")
    assert torch.equal(write("varint", p, 1 << 20), data)
    assert torch.equal(read("varint", data, 3, 1 << 20), p)


@every_coder
@given(st.data())
def test_positions_come_back_and_sizes_are_as_declared(how: Index, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 700))
    p = positions(*sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=n))))
    field = write(how, p, n)
    dtype, size = layout(how, len(p), n)
    assert field.dtype == dtype
    assert field.numel() == size if exact(how) else field.numel() <= size
    back = read(how, field, len(p), n)
    assert back.dtype == torch.int64
    assert torch.equal(back, p)


@every_coder
@pytest.mark.parametrize(("k", "n"), [(1, 1), (0, 9), (9, 9), (1, 1 << 40), (300, 1 << 36), (5000, 100_003)])
def test_corners_and_positions_beyond_32_bits(how: Index, k: int, n: int) -> None:
    if n > 1 << 30 and how in ("int32", "bitmap"):
        return  # cannot hold them; allocates as much
    p = torch.arange(k, dtype=torch.int64) * (n // max(1, k)) + n // max(1, k) - 1
    for where in (p, torch.arange(k), torch.arange(n - k, n)):
        assert torch.equal(read(how, write(how, where, n), k, n), where)


def test_exact_sizes() -> None:
    """n = 1 000 003, 1 %: l = 6, so 7 501 bytes of low bits and ceil((10 001 + 15 625) / 8) of high ones."""
    sizes = {how: layout(how, 10_001, 1_000_003)[1] for how in INDEX}
    assert sizes["elias_fano"] == 7_501 + 3_204
    assert sizes["packed"] == math.ceil(10_001 * 20 / 8)
    assert sizes["bitmap"] == 125_001
    assert sizes["compact"] == 7_501 + 3_204
    assert sizes["smallest"] == 1 + 7_501 + 3_204
    assert sizes["varint"] == 10_001 + (1_000_003 - 10_001) // 128 + (1_000_003 - 10_001) // 16384
    assert layout("int32", 10_001, 1_000_003) == (torch.int32, 10_001)


def test_sizes_are_right_where_32_bits_overflow() -> None:
    """2^40 positions, 2^34 of them: computed, never allocated."""
    k, n = 1 << 34, 1 << 40
    assert layout("packed", k, n)[1] == k * 40 // 8
    assert layout("bitmap", k, n)[1] == n // 8
    assert layout("elias_fano", k, n)[1] == k * 6 // 8 + math.ceil((k + (n - 1 >> 6)) / 8)


def test_the_bound_of_varint_is_reached() -> None:
    """Two distances of 128 and one of 0 among 3 of 259 positions: no other three take more."""
    p = positions(128, 257, 258)
    assert len(write("varint", p, 259)) == layout("varint", 3, 259)[1] == 5


def test_the_smallest_is_chosen() -> None:
    n = 1 << 16
    many, few, one = drawn(n // 3, n), drawn(n // 64, n), positions(60_000)
    run = torch.arange(5000, 6000)  # neighbours: one byte each, where elias_fano takes 8 bits and more
    assert [int(write("smallest", p, n)[0]) for p in (many, few, one, run)] == [1, 2, 0, 3]
    for p in (many, few, one, run):
        sizes = [len(write(how, p, n)) for how in (*FIXED, "varint")]
        assert len(write("smallest", p, n)) == 1 + min(sizes)
        assert len(write("compact", p, n)) == min(sizes[:3])


def test_close_to_the_entropy() -> None:
    k, n = 10_001, 1_000_003
    p = k / n
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) * n / k
    assert entropy < 8 * layout("elias_fano", k, n)[1] / k < entropy + 0.5


@every_coder
def test_any_bytes_are_refused_or_are_what_an_encoder_writes(how: Index) -> None:
    """Whatever is accepted is written again to the same bytes: nothing else could have been meant."""
    g, accepted = torch.Generator().manual_seed(0), 0
    for trial in range(1000):
        n = int(torch.randint(1, 40, (), generator=g))
        k = int(torch.randint(0, n + 1, (), generator=g))
        dtype, most = layout(how, k, n)
        size = most if exact(how) else int(torch.randint(0, most + 1, (), generator=g))
        field = torch.randint(-2 if how == "int32" else 0, n + 2 if trial % 2 else 256, (size,), generator=g).to(dtype)
        if trial % 3 == 0 and k:  # nearly right
            field = write(how, drawn(k, n, trial), n)
            at = torch.randint(len(field), (), generator=g) if len(field) else None
            if at is not None:
                field[at] ^= 1 << int(torch.randint(0, 8, (), generator=g))
        try:
            p = read(how, field, k, n)
        except PacketError:
            continue
        accepted += 1
        assert torch.equal(write(how, p, n), field)
    assert accepted


ASCENDING = "'index' is not a list of ascending positions\n  expected  ascending positions below 16"


@pytest.mark.parametrize(
    ("how", "data", "said"),
    [
        ("packed", "51 F6 00", "another length"),
        ("packed", "15 F6", ASCENDING),  # 5, 1
        ("packed", "11 F6", ASCENDING),  # 1, 1
        ("bitmap", "62 81", "bits set"),  # five of four
        ("bitmap", "62 00", "bits set"),
        ("elias_fano", "4D", "another length"),
        ("elias_fano", "CD E5", "bits set"),
        ("elias_fano", "8D E5", "bits set"),  # beyond the 7 bits
        ("elias_fano", "4D ED", ASCENDING),  # 7, 6
        ("varint", "01 03 00", "another number"),
        ("varint", "01 03 00 08 01", "another number"),
        ("varint", "01 03 00 88", "another number"),
        ("varint", "01 03 00 09", ASCENDING),  # 16
        ("varint", "01 03 80 00 08", "distance that is too long"),  # zero in two bytes
        ("varint", "FF FF FF FF FF FF FF FF FF FF FF 7F 01 01 01", "distance that is too long"),
        ("varint", "7F 7F 7F 7F", "beyond the end"),
        ("smallest", "04 51 F6", "does not say how"),
        ("smallest", "", "does not say how"),
        ("smallest", "01 62 80", "not written in the smallest way"),
        ("smallest", "03 01 03 00 08", "not written in the smallest way"),
    ],
)
def test_what_no_encoder_writes_is_refused(how: Index, data: str, said: str) -> None:
    with pytest.raises(PacketError, match=said):
        read(how, raw(data), 4, 16)


def test_bits_after_the_last_number_are_refused() -> None:
    assert read("packed", raw("07"), 1, 8).tolist() == [7]
    with pytest.raises(PacketError, match="bits set"):
        read("packed", raw("0F"), 1, 8)
    with pytest.raises(PacketError, match="bits set"):
        read("bitmap", raw("10"), 1, 4)


def test_lengths_are_checked_before_anything_is_allocated() -> None:
    for how in FIXED:
        with pytest.raises(PacketError, match="another length"):
            read(how, raw("00"), 1 << 50, 1 << 60)
    with pytest.raises(PacketError, match="another number"):
        read("varint", raw("00"), 1 << 50, 1 << 60)
