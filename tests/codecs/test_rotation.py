"""The rotation is orthonormal, its own to every key, and finite at the edges of float32."""

from __future__ import annotations

import re

import pytest
import torch

from thinwire.codecs import Chain, Rotation, int4, parse, rotation
from thinwire.codecs.rotation import num_parts, parts
from thinwire.errors import ConfigError, PacketError

X = torch.randn(1000, generator=torch.Generator().manual_seed(0))


def _sylvester(width: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix


def test_it_is_the_hadamard_matrix_with_columns_of_either_sign() -> None:
    """Each element's column holds +-1 / sqrt(B) only, and but for the columns' signs the matrix is Sylvester's."""
    codec = rotation(block=64)
    columns = torch.stack([codec.encode(unit, 5)["value"] for unit in torch.eye(64)], dim=1) * 2.0**7 * 8
    assert torch.equal(columns.abs(), torch.ones(64, 64))
    unsigned = columns * columns[0]  # the first row of Hadamard's matrix is all ones: what is there are the signs
    assert torch.equal(unsigned, _sylvester(64))


@pytest.mark.parametrize("n", [0, 1, 2, 7, 64, 127, 1000, 4096, 5001])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("block", [64, 128, 4096])
def test_norms_stay_and_the_way_back_leads_home(n: int, rounds: int, block: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    codec = rotation(block=block, rounds=rounds)
    fields = codec.encode(x, 3)
    down = 2.0 ** (block.bit_length() // 2 + 4)
    assert (fields["value"] * down).norm().item() == pytest.approx(x.norm().item(), rel=1e-6)
    torch.testing.assert_close(codec.decode(fields, n, 3), x, rtol=0, atol=1e-6 * max(1.0, x.abs().sum().item() / 64))


def test_one_large_element_is_spread_over_its_block() -> None:
    x = torch.zeros(8192)
    x[5000] = 1
    value = rotation.encode(x, 0)["value"]
    assert not value[:4096].any()
    assert torch.equal(value[4096:].abs(), torch.full((4096,), 2.0**-16))  # 1 / sqrt(4096), times 2^-10


def test_what_is_left_over_is_cut_into_powers_of_two() -> None:
    assert list(parts(1000, 4096)) == [
        (0, 512, 512), (512, 768, 256), (768, 896, 128), (896, 960, 64), (960, 992, 32), (992, 1000, 8),
    ]  # fmt: skip
    assert list(parts(200, 64)) == [(0, 192, 64), (192, 200, 8)]
    assert [num_parts(n, 64) for n in (0, 1, 64, 200, 127)] == [0, 1, 1, 4, 7]


def test_keys_and_options_change_the_result() -> None:
    values = [codec.encode(X, key)["value"] for codec, key in
              [(rotation, 1), (rotation, 2), (rotation(block=64), 1), (rotation(rounds=2), 1)]]  # fmt: skip
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_results_do_not_depend_on_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinwire.codecs import blocks

    codec = rotation(block=64, rounds=2)
    whole = codec.encode(X, 3)
    monkeypatch.setitem(blocks._PIECE, "cpu", 128)
    assert torch.equal(codec.encode(X, 3)["value"], whole["value"])
    assert torch.equal(codec.decode(whole, 1000, 3), rotation(block=64, rounds=2).decode(whole, 1000, 3))


def test_heavy_tails_cost_a_quantiser_less_after_it() -> None:
    x = X.clone()
    x[::250] = 16
    errors = [(codec.decode(codec.encode(x, 1), 1000, 1) - x).norm() for codec in (rotation | int4(256), int4(256))]
    assert errors[0] < errors[1] / 2


def test_a_chain_decodes_what_the_quantiser_left() -> None:
    codec = rotation | int4
    assert isinstance(codec, Chain)
    fields = codec.encode(X, 1)
    assert list(fields) == ["value.scale", "value.code"]
    assert parse("rotation(block=64, rounds=2) | int4").spec == "rotation(block=64, rounds=2) | int4"


def test_the_largest_numbers_stay_finite_and_come_back() -> None:
    x = torch.full((4096,), torch.finfo(torch.float32).max)
    value = rotation.encode(x, 0)["value"]
    assert value.isfinite().all()
    torch.testing.assert_close(rotation.decode({"value": value}, 4096, 0), x)


def test_any_numbers_decode_to_finite_ones() -> None:
    for bad in (torch.nan, torch.inf, torch.finfo(torch.float32).max):
        assert rotation.decode({"value": torch.full((100,), bad)}, 100, 0).isfinite().all()


@pytest.mark.parametrize("block", [0, 32, 100, 2**21, 64.0, True, "64"])
def test_other_blocks_are_refused(block: object) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"rotation is to have blocks of {block!r}\n  expected  a power")):
        Rotation(block)  # type: ignore[arg-type]


@pytest.mark.parametrize("rounds", [0, 3, True, "1"])
def test_other_rounds_are_refused(rounds: object) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"rotation in {rounds!r} rounds\n  expected  rounds=1 or")):
        Rotation(rounds=rounds)  # type: ignore[arg-type]


def test_short_fields_are_refused() -> None:
    with pytest.raises(PacketError):
        rotation.decode({"value": torch.zeros(9)}, 10, 0)
