"""Three levels at random: their exact variance, the clip, and five of them in a byte."""

from __future__ import annotations

import re

import pytest
import torch

from thinwire.codecs import TernGrad, qsgd, terngrad
from thinwire.errors import ConfigError, PacketError
from written import again


def _error(codec: TernGrad, x: torch.Tensor, draws: int) -> float:
    """Mean squared error over keys, of the energy."""
    errors = [(again(codec, x, key) - x).double().square().sum().item() for key in range(draws)]
    return sum(errors) / draws / x.double().square().sum().item()


def _laplace(n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=g).sign() * -torch.rand(n, generator=g).clamp(min=1e-12).log()


def test_levels() -> None:
    x = torch.tensor([2.0, -2, 0, 0, 0.5, -0.5])
    for key in range(20):
        decoded = again(terngrad, x, key)
        assert decoded[:4].tolist() == [2, -2, 0, 0]
        assert set(decoded[4:].tolist()) <= {2, -2, 0}
    fields = terngrad(block=4).encode(x[:4], 0)
    assert fields["code"].tolist() == [2 | 0 << 2 | 1 << 4 | 1 << 6]


def test_the_variance_is_the_exact_one() -> None:
    """sum |x| (m - |x|): 2.1 of normal numbers' energy at 4096."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    m = x.abs().amax()
    due = ((x.abs() * (m - x.abs())).double().sum() / x.double().square().sum()).item()
    assert due == pytest.approx(2.1, abs=0.4)
    assert _error(terngrad(block=4096), x, 400) == pytest.approx(due, rel=0.03)


def test_the_bound_is_reached() -> None:
    x = torch.full((64,), 1 / 9)
    x[0] = 1
    codec = terngrad(block=64)
    assert codec.variance(64) == 3.5
    assert _error(codec, x, 400) == pytest.approx(3.5, rel=0.03)


def test_a_clip_trades_noise_for_bias() -> None:
    x = _laplace(4096)
    clipped = terngrad(block=4096, clip=2.5)
    assert _error(clipped, x, 100) < 0.4 * _error(terngrad(block=4096), x, 100)
    limit = 2.5 * x.std(correction=0).item()
    assert again(clipped, x).unique().tolist() == pytest.approx([-limit, 0, limit], rel=1e-5)
    assert not clipped.traits.unbiased
    assert clipped.variance(4096) is None
    mean = torch.stack([again(clipped, x, key) for key in range(200)]).double().mean(dim=0)
    assert (mean - x.clamp(-limit, limit)).square().sum() < 0.02 * x.square().sum(), "of the cut vector it is the mean"


def test_a_clip_leaves_constants() -> None:
    for x in (torch.full((64,), 0.3), torch.zeros(64)):
        assert torch.equal(again(terngrad(clip=2.5), x), x)


def test_trits_are_the_same_numbers_in_fewer_bytes() -> None:
    for n, block in ((1000, 64), (12, 12), (77, 64), (3, 1024)):
        x = torch.randn(n, generator=torch.Generator().manual_seed(n))
        bits, trits = terngrad(block=block), terngrad(block=block, code="trits")
        assert torch.equal(again(bits, x, 3), again(trits, x, 3))
    assert terngrad(code="trits").layout(1 << 20)["code"][1] == 1024 * 205
    # By hand: 2 0 1 1 2 | 0 1 1 1 1 planar in rows of 10: t_j and t_(j+2) beside each other.
    codec = terngrad(block=12, code="trits")
    fields = codec.encode(torch.tensor([1.0, -1, 0, 0, 1, -1, 1]), 0)  # the pad is three zeros
    assert fields["code"].tolist() == [2 + 3 * 1 + 9 * 2 + 27 * 2 + 81 * 1, 0 + 3 * 1 + 9 * 0 + 27 * 1 + 81 * 1]


def test_it_is_qsgd_of_one_level() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    other = qsgd(1, block=64, norm="max")
    assert torch.equal(again(terngrad(block=64), x, 5), other.decode(other.encode(x, 5), 1000, 5))


@pytest.mark.parametrize(("code", "byte"), [("bits", 0b11), ("trits", 243)])
def test_codes_of_a_fourth_value_are_refused(code: str, byte: int) -> None:
    codec = terngrad(code=code)
    fields = dict(codec.encode(torch.ones(8), 0))
    fields["code"][0] = byte
    with pytest.raises(PacketError, match="field 'code' holds a code of more than three values"):
        codec.decode(fields, 8, 0)


def test_options() -> None:
    assert terngrad() == terngrad == TernGrad(1024, 0.0, "bits")
    assert terngrad(64, clip=2.5, code="trits").spec == "terngrad(block=64, clip=2.5, code='trits')"
    with pytest.raises(ConfigError, match=re.escape("terngrad is to have blocks of 6\n  expected  a whole number")):
        terngrad(block=6)
    for clip in (0.5, -1, float("nan"), float("inf"), True, "2.5"):
        with pytest.raises(ConfigError, match=re.escape(f"terngrad is to clip at {clip!r} standard deviations\n  exp")):
            terngrad(clip=clip)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=re.escape("terngrad is to write the code 'base3'\n  expected  code='bits'")):
        terngrad(code="base3")  # type: ignore[arg-type]
