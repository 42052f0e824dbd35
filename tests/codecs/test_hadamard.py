"""The error table of Gaussian levels, the bounds that hold for every vector, and the bias of one round."""

from __future__ import annotations

import math
import re

import pytest
import torch

from thinwire.codecs import Hadamard, hadamard, parse, rotation
from thinwire.codecs.hadamard import CENTROIDS, MAJORANTS
from thinwire.codecs.memory import Scratch
from thinwire.codecs.planar import unpack
from thinwire.errors import ConfigError, PacketError

UNBIASED = {1: 0.571, 2: 0.1333, 3: 0.0357, 4: 0.0096}
LEAST = {1: 0.3634, 2: 0.1176, 3: 0.0345, 4: 0.0095}


def _errors(codec: Hadamard, rows: torch.Tensor) -> torch.Tensor:
    """||C(x) - x||^2 / ||x||^2 of each row, each with a key of its own."""
    n = rows.shape[1]
    decoded = torch.stack([codec.decode(codec.encode(row, key), n, key) for key, row in enumerate(rows)])
    return (decoded - rows).square().sum(dim=1) / rows.square().sum(dim=1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_error_is_that_of_a_gaussian_whatever_the_vector(bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    normal = torch.randn(60, 4096, generator=g)
    for scale, due in (("unbiased", UNBIASED), ("least_squares", LEAST)):
        assert _errors(hadamard(bits, scale=scale), normal).mean().item() == pytest.approx(due[bits], rel=0.02)  # type: ignore[arg-type]
    tails = normal.sign() * normal.square()
    assert _errors(hadamard(bits), tails).mean().item() == pytest.approx(UNBIASED[bits], rel=0.05)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_quartics_lie_above_the_quantisers_error(bits: int) -> None:
    """On a fine grid up to 8; beyond, the error is less than u^2 and the slopes decide."""
    a, b, c = MAJORANTS[bits]
    u = torch.linspace(0, 8, 80_001, dtype=torch.float64)
    levels = torch.tensor(CENTROIDS[bits], dtype=torch.float64)
    error = (u[:, None] - levels).abs().amin(dim=1).square()
    assert (a + b * u**2 + c * u**4 >= error).all()
    assert b + c * 64 >= 1 - 2 * CENTROIDS[bits][-1] / 8 + (CENTROIDS[bits][-1] / 8) ** 2
    assert hadamard(bits, scale="least_squares").contraction(9) == pytest.approx(1 - a - b - 3 * c, abs=2**-12)


@pytest.mark.parametrize("bits", [1, 4])
def test_the_bounds_hold_for_vectors_made_against_them(bits: int) -> None:
    """Two equal elements make a rotated block of zeros and equal numbers: one bit keeps half of the energy."""
    codec = hadamard(bits, block=64, scale="least_squares")
    delta = codec.contraction(64)
    assert delta is not None
    for count in (1, 2, 3, 4):
        x = torch.zeros(64)
        x[:count] = 1
        assert _errors(codec, x.repeat(40, 1)).mean().item() <= 1 - delta
    pair = torch.zeros(40, 64)
    pair[:, :2] = 1
    assert _errors(hadamard(1, block=64, scale="least_squares"), pair).mean().item() == pytest.approx(0.5, abs=1e-3)


def test_one_round_keeps_a_bias_that_two_do_not() -> None:
    """The mean of K decodings of a heavy-tailed vector: its error is 1/K of one decoding's, unless a bias stays."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=g).sign() * (2 * torch.randn(4096, generator=g)).exp()
    draws = 300
    ratio = {}
    for rounds in (1, 2):
        codec = hadamard(1, rounds=rounds)
        decoded = torch.stack([codec.decode(codec.encode(x, key), 4096, key) for key in range(draws)])
        single = (decoded - x).square().sum(dim=1).mean()
        ratio[rounds] = (draws * (decoded.mean(dim=0) - x).square().sum() / single).item()
    assert ratio[1] > 2, ratio
    assert ratio[2] == pytest.approx(1, abs=0.1)


def test_the_unbiased_scale_keeps_the_projection_and_the_other_is_shorter() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    for bits in CENTROIDS:
        one, other = (hadamard(bits, scale=scale) for scale in ("unbiased", "least_squares"))  # type: ignore[arg-type]
        full, least = one.encode(x, 1), other.encode(x, 1)
        assert torch.equal(full["code"], least["code"])
        assert (one.decode(full, 4096, 1) @ x / (x @ x)).item() == pytest.approx(1, abs=1e-5)
        decoded = other.decode(least, 4096, 1)
        assert (decoded @ (x - decoded)).item() == pytest.approx(0, abs=1e-5 * (x @ x).item())
        assert least["scale"] < full["scale"]


def test_codes_are_sign_and_nearest_level_of_the_rotated_vector() -> None:
    x = torch.randn(128, generator=torch.Generator().manual_seed(0))
    codec = hadamard(3, block=128)
    z = rotation(block=128).encode(x, 7)["value"]
    u = z * (math.sqrt(128) / z.norm())
    place = (u.abs()[:, None] - torch.tensor(CENTROIDS[3])).abs().argmin(dim=1)
    fields = codec.encode(x, 7)
    codes = unpack(fields["code"], (0, 128), (1, 128), 128, 3, Scratch(torch.device("cpu")))
    assert torch.equal(codes[0], (place + 4 * (z < 0)).to(torch.uint8))
    assert fields["scale"].item() == pytest.approx((z @ z / (torch.tensor(CENTROIDS[3])[place] @ z.abs())).item())


def test_vectors_of_one_large_element_decode_exactly() -> None:
    x = torch.zeros(4096)
    x[17] = -3
    for bits in CENTROIDS:
        torch.testing.assert_close(hadamard(bits).decode(hadamard(bits).encode(x, 0), 4096, 0), x, atol=1e-6, rtol=1e-6)


def test_sizes() -> None:
    """1 000 003 elements are 244 blocks and a tail of 579 = 512 + 64 + 2 + 1."""
    for bits in CENTROIDS:
        layout = hadamard(bits).layout(1_000_003)
        assert {name: size for name, (_, size) in layout.items()} == {"scale": 248, "code": -(-1_000_003 * bits // 8)}
    assert hadamard.layout(0)["code"][1] == 0


def test_results_do_not_depend_on_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinwire.codecs import blocks

    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    codec = hadamard(3, block=64)
    whole = codec.encode(x, 3)
    monkeypatch.setitem(blocks._PIECE, "cpu", 128)
    pieced = codec.encode(x, 3)
    assert all(torch.equal(whole[name], pieced[name]) for name in whole)
    assert torch.equal(codec.decode(whole, 1000, 3), hadamard(3, block=64).decode(pieced, 1000, 3))


def test_every_option_changes_the_result() -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    decoded = [
        codec.decode(codec.encode(x, 1), 500, 1)
        for codec in (hadamard, hadamard(2), hadamard(block=64), hadamard(scale="least_squares"), hadamard(rounds=2))
    ]
    assert not any(torch.equal(a, b) for i, a in enumerate(decoded) for b in decoded[:i])


def test_expressions() -> None:
    assert hadamard() == hadamard == parse("hadamard")
    full = hadamard(2, block=64, scale="least_squares", rounds=2)
    assert full.spec == "hadamard(bits=2, block=64, scale='least_squares', rounds=2)"
    assert parse(full.spec) == full


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 2.0**-130])
def test_blocks_of_almost_nothing_are_zero(magnitude: float) -> None:
    codec = hadamard(2, block=64)
    x = torch.cat([torch.full((64,), magnitude), torch.ones(64)])
    decoded = codec.decode(codec.encode(x, 0), 128, 0)
    assert not decoded[:64].any()
    assert decoded[64:].all()


def test_what_cannot_be_is_refused() -> None:
    for bits in (0, 5, 1.0, True, "1"):
        with pytest.raises(
            ConfigError, match=re.escape(f"hadamard is to write {bits!r} bits an element\n  expected  1")
        ):
            Hadamard(bits)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="hadamard is to have blocks of 100\n  expected  a power of two from 64"):
        hadamard(block=100)
    with pytest.raises(ConfigError, match=r"hadamard is to scale 'least'\n  expected  scale='unbiased' or"):
        hadamard(scale="least")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="hadamard in 3 rounds"):
        hadamard(rounds=3)
    fields = dict(hadamard.encode(torch.ones(64), 0))
    for bad in (-1.0, torch.nan, torch.inf, 3e38):
        with pytest.raises(PacketError, match="scale that is negative, not finite or too large"):
            hadamard.decode({**fields, "scale": torch.tensor([bad])}, 64, 0)
