"""Projection: unbiased, of the error that it states, exact when its basis is complete, and what its options change."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from thinwire.codecs import Projection, parse, projection
from thinwire.codecs.projection import apportion
from thinwire.errors import ConfigError, PacketError
from thinwire.randomness import mix

X = torch.randn(1000, generator=torch.Generator().manual_seed(0))
WHOLE = X[:768].mul(8).round()


def decoded(codec: Projection, x: Tensor, key: int) -> Tensor:
    return codec.decode(codec.encode(x, key), len(x), key)


def relative(codec: Projection, x: Tensor, draws: int) -> float:
    """Mean of ||C(x) - x||^2 / ||x||^2."""
    errors = [(decoded(codec, x, mix(i)) - x).square().sum().item() for i in range(draws)]
    return sum(errors) / draws / x.square().sum().item()


def test_directions_are_signs_at_right_angles() -> None:
    """V^T V = d: coefficients of unit vectors are the entries of V, times 2^-7 / 8 and d/K."""
    codec = projection(16, per_block=16)
    units = torch.eye(64)
    v = torch.stack([codec.encode(unit, 5)["value"] for unit in units]) * (2.0**7 * 8 / 4)  # [d, K]
    assert torch.equal(v.abs(), torch.ones(64, 16))
    assert torch.equal(v.T @ v, 64 * torch.eye(16))
    other = torch.stack([codec.encode(unit, 6)["value"] for unit in units]) * (2.0**7 * 8 / 4)
    assert not torch.equal(other, v)


def test_blocks_have_directions_of_their_own() -> None:
    codec = projection(32, per_block=16)
    unit = torch.zeros(2, 64, 64)
    v = []
    for i in range(64):
        for block in range(2):
            unit.zero_()[block, 0, i] = 1
            value = codec.encode(unit[:, 0].reshape(-1), 5)["value"]
            v.append(value[value != 0].sign()[:1])
    signs = torch.cat(v).view(64, 2)
    assert not torch.equal(signs[:, 0], signs[:, 1])


@pytest.mark.parametrize("codec", [projection(768), projection(768, shared=True), projection(10**6, shrink=1)])
def test_a_complete_basis_is_exact(codec: Projection) -> None:
    """Whole numbers in blocks of 64: their sums are exact, and the root of 64 is a power of two."""
    assert torch.equal(decoded(codec, WHOLE, 3), WHOLE)
    for n in (1, 7, 65, 700):  # filled up, and the root of 8 is none: a rounding for each of the sums
        bound = 2 * (6 + 2) * 2.0**-24 * X[:n].norm().item()
        assert (decoded(codec, X[:n], 3) - X[:n]).abs().max().item() <= bound


@pytest.mark.parametrize("shared", [False, True])
def test_the_mean_is_right(shared: bool) -> None:
    """Sixty keys: what is left is noise of sqrt((d/K - 1) / 60) of the norm, known to sqrt(2 / 1000) of itself."""
    codec = projection(250, per_block=16, shared=shared)
    mean = torch.stack([decoded(codec, X, mix(i)) for i in range(60)]).mean(dim=0)
    error = (mean - X).norm().item() / X.norm().item()
    assert error <= math.sqrt(4 / 60) * 1.2
    assert error >= math.sqrt(2.5 / 60) * 0.8, "noise of other keys is other noise"


@pytest.mark.parametrize(("d", "k"), [(512, 16), (1024, 64), (4096, 128)])
def test_the_error_follows_its_law(d: int, k: int) -> None:
    """d/K - 1 for one block; within 10 % of the paper's d/K, which is that of independent vectors."""
    x = torch.randn(d, generator=torch.Generator().manual_seed(d))
    codec = projection(k, per_block=k)
    found = relative(codec, x, 6400 // k)  # a mean over 6400 squares: known to sqrt(2 / 6400), 2 %
    assert found == pytest.approx(d / k - 1, rel=0.06)
    assert found == pytest.approx(d / k, rel=0.1)
    assert codec.variance(d) == pytest.approx(d / k - 1, abs=1e-3)


def test_a_block_that_is_filled_up_errs_less() -> None:
    """d of D elements: (d - 1) (D - K) / ((D - 1) K), as rows are drawn at random."""
    x = torch.randn(600, generator=torch.Generator().manual_seed(1))
    assert relative(projection(64, per_block=64), x, 200) == pytest.approx(599 * 960 / (1023 * 64), rel=0.05)


def test_counts_follow_norms_and_lower_the_error() -> None:
    x = torch.cat([X[:512], 0.01 * X[:512]])
    codec, even = projection(128, per_block=8), projection(128, per_block=8, shared=True)
    counts = codec.encode(x, 1)["count"]
    assert counts.dtype == torch.int32
    assert int(counts.sum()) == 128
    assert int(counts[:8].min()) > 10
    assert int(counts[8:].max()) <= 2
    assert relative(codec, x, 40) < 0.6 * relative(even, x, 40)


def test_shrinking_is_what_is_best_for_so_many_members() -> None:
    """Of 1 and 4 members' mean, each with a basis of its own, the error is least with shrink at their number."""
    choices = {shrink: projection(128, per_block=128, shrink=shrink) for shrink in (1, 4, 0)}
    for members in (1, 4):
        errors = {}
        for shrink, codec in choices.items():
            means = [torch.stack([decoded(codec, X, mix(i, m)) for m in range(members)]).mean(0) for i in range(20)]
            errors[shrink] = sum((mean - X).square().sum().item() for mean in means)
        assert min(errors, key=errors.__getitem__) == members


def test_one_member_shrinks_to_the_orthogonal_projection() -> None:
    x, codec = X[:512], projection(128, per_block=128, shrink=1)
    once = decoded(codec, x, 7)
    torch.testing.assert_close(decoded(codec, once, 7), once, rtol=0, atol=2.0**-24 * 22 * x.norm().item())
    assert once.norm() < x.norm()
    assert codec.traits.wants_feedback
    assert codec.contraction(512) == pytest.approx(128 / 512, abs=1e-3)


def test_what_shares_a_basis_adds_up() -> None:
    codec = projection(100, per_block=10, shared=True)
    assert codec.traits.linear
    assert not projection(100).traits.linear
    a, b = WHOLE, WHOLE.flip(0)
    torch.testing.assert_close(
        codec.encode(a, 3)["value"] + codec.encode(b, 3)["value"], codec.encode(a + b, 3)["value"]
    )


def test_blocks_are_as_small_as_coefficients_allow() -> None:
    blocks = {(k, m): projection(k, per_block=m)._blocks(1000) for k, m in ((1000, 1), (1000, 100), (64, 16), (4, 16))}
    assert {told: block for told, (block, _) in blocks.items()} == {
        (1000, 1): 64, (1000, 100): 128, (64, 16): 256, (4, 16): 1024,
    }  # fmt: skip
    assert blocks[1000, 1][1].tolist() == [64] * 15 + [64]
    assert projection(64, per_block=16)._blocks(520)[1].tolist() == [256, 256, 8]


ANOTHER = """
import hashlib, torch
from thinwire.codecs import parse
x = torch.arange(5000).sub(2500).square().remainder(977).sub(488).float()
codec = parse("projection(300, per_block=20)")
y = codec.decode(codec.encode(x, 11), 5000, 11)
print(hashlib.sha256(y.numpy().tobytes()).hexdigest())
"""


def test_another_process_rebuilds_the_same_bits() -> None:
    """With another number of threads, too: nothing is left to the order of a sum."""
    told = set()
    for threads in ("1", "2"):
        environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", ANOTHER], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        told.add(done.stdout)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("weights", "most", "total", "counts"),
    [
        ([1, 1, 1], [9, 9, 9], 12, [4, 4, 4]),
        ([2, 1, 1], [9, 9, 9], 11, [5, 3, 3]),
        ([1, 0, 0], [9, 9, 9], 11, [9, 1, 1]),
        ([1, 0, 0], [4, 9, 9], 11, [4, 4, 3]),
        ([0, 0, 0], [8, 8, 4], 8, [3, 3, 2]),
        ([5, 1, 1], [2, 2, 2], 6, [2, 2, 2]),
        ([1e300, 1, 1], [64, 1, 1], 66, [64, 1, 1]),
        ([], [], 0, []),
    ],
)
def test_coefficients_are_shared_out(weights: list[float], most: list[int], total: int, counts: list[int]) -> None:
    found = apportion(np.array(weights, dtype=np.float64), np.array(most, dtype=np.int64), total)
    assert found.tolist() == counts


@pytest.mark.parametrize("counts", [[0, 50, 50], [-1, 51, 50], [65, 20, 15], [33, 33, 33]])
def test_counts_that_do_not_add_up_are_refused(counts: list[int]) -> None:
    codec = projection(100, per_block=30)
    fields = {**codec.encode(WHOLE[:192], 1), "count": torch.tensor(counts, dtype=torch.int32)}
    with pytest.raises(PacketError, match="field 'count' does not share the coefficients out among the blocks"):
        codec.decode(fields, 192, 1)


def test_options() -> None:
    assert parse("projection(100, per_block=4, shrink=2)") == projection(100, per_block=4, shrink=2)
    assert parse("projection") == projection()
    assert projection(7, shared=True).spec == "projection(7, shared=True)"
    assert projection().spec == "projection(4096)"
    assert projection(7).traits.unbiased
    assert not projection(7, shrink=2).traits.unbiased
    assert projection(7, shrink=2).contraction(1000) is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"k": 0}, "write 0 coefficients"),
        ({"k": 0.5}, "write 0.5 coefficients"),
        ({"per_block": 0}, "give a block 0 coefficients"),
        ({"shrink": -1}, "shrink for -1 members"),
        ({"shared": 3}, "with shared 3"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=f"projection (is to )?{told}"):
        Projection(**options)  # type: ignore[arg-type]
