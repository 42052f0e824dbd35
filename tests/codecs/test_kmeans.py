"""Clustering: what is exact, what it guarantees, and the chain that FedZip is."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.codecs import KMeans, fp32, kmeans, parse, topk
from thinwire.codecs.planar import unpack_row
from thinwire.errors import ConfigError, PacketError
from written import again

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
X = torch.randn(5000, generator=torch.Generator().manual_seed(0))


def _error(codec: KMeans, x: torch.Tensor) -> float:
    return (again(codec, x).double() - x.double()).square().sum().item()


@given(st.lists(FLOATS, min_size=1, max_size=5), st.integers(0, 200))
def test_as_many_centroids_as_values_are_exact(values: list[float], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.tensor(values)[torch.randint(len(values), (40,), generator=g)]
    assert torch.equal(again(kmeans(5), x), x)


def test_twice_is_as_once() -> None:
    once = again(kmeans(7), X)
    assert torch.equal(again(kmeans(7), once), once)


def test_centroids_are_means_and_elements_take_the_nearest() -> None:
    fields = kmeans(4).encode(X, 0)
    centroid, code = fields["centroid"], unpack_row(fields["code"], len(X), 2)
    nearest = (X[:, None] - centroid).abs().argmin(dim=1)
    assert torch.equal(code.long(), nearest)
    for j in range(4):
        assert centroid[j].item() == pytest.approx(X[code == j].double().mean().item(), rel=1e-2)


@pytest.mark.parametrize(("k", "distortion"), [(2, 0.3634), (3, 0.1902), (4, 0.1175), (8, 0.03454), (16, 0.009497)])
def test_of_normal_numbers_it_is_lloyds_and_maxs_quantiser(k: int, distortion: float) -> None:
    """Distortions of the best quantiser of N(0, 1): Max 1960, table I."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double()
    assert _error(kmeans(k), x.float()) / x.square().sum().item() == pytest.approx(distortion, rel=0.02)


@given(st.lists(st.integers(-8, 8), min_size=3, max_size=7))
def test_it_never_does_worse_than_two_means(values: list[int]) -> None:
    x = torch.tensor(values).float()
    spared = x.abs().double().sum().item() ** 2 / len(x)
    assert _error(kmeans(2), x) <= x.double().square().sum().item() - spared + 1e-9


def test_of_few_elements_it_is_the_best_of_all_partitions() -> None:
    """Lloyd's iteration may stop short; here it does not. The least error of all ways to cut nine numbers in three."""
    x = torch.tensor([-5.0, -4.5, -4, -0.5, 0, 0.5, 3, 8, 9])
    cuts = itertools.combinations(range(1, 9), 2)
    parts = ((x[:a], x[a:b], x[b:]) for a, b in cuts)
    best = min(sum((p - p.mean()).square().sum().item() for p in three) for three in parts)
    assert _error(kmeans(3), x) == pytest.approx(best, rel=1e-5)


def test_more_centroids_lose_less() -> None:
    errors = [_error(kmeans(k), X) for k in (2, 3, 4, 8, 16, 64, 256)]
    assert errors == sorted(errors, reverse=True)
    assert kmeans(3).spec == "kmeans(k=3)"
    assert kmeans(16) == kmeans() == kmeans == parse("kmeans")


def test_numbers_of_all_sizes_at_once() -> None:
    x = torch.tensor([3e38, -3e38, 1e-40, 1.0, 1.0 + 2.0**-20, 0.0, -1e-20] * 3)
    decoded = again(kmeans(3), x)
    assert decoded.isfinite().all()
    assert torch.equal(decoded[:2], x[:2])


def test_heavy_tails_get_centroids_of_their_own() -> None:
    """From centroids spread evenly over the range, Lloyd's iteration leaves 0.059 of this energy."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=g) / torch.randn(3, 100_000, generator=g).square().mean(dim=0).sqrt()
    assert _error(kmeans(16), x) < 0.04 * x.double().square().sum().item()


def test_the_chain_that_fedzip_is() -> None:
    codec = parse("topk(0.01) | kmeans(4) | rans")
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).pow(3)
    assert codec == topk(0.01) | kmeans(4) | parse("rans")
    fields = codec.encode(x, 0)
    assert list(fields) == ["value.centroid", "value.code", "index"]
    plain = topk(0.01).decode(topk(0.01).encode(x, 0), len(x), 0)
    decoded = codec.decode(fields, len(x), 0)
    assert torch.equal(decoded != 0, plain != 0)
    assert len(decoded.unique()) == 5
    assert sum(field.numel() for field in fields.values()) < 0.3 * 8000


@pytest.mark.parametrize("k", [1, 257, 0, 2.0, True, "4", None])
def test_numbers_of_centroids_out_of_range_are_refused(k: object) -> None:
    with pytest.raises(ConfigError, match=r"kmeans is to fit .* centroids\n  expected  a whole number from 2 to 256"):
        KMeans(k)  # type: ignore[arg-type]


def test_what_no_encoder_writes_is_refused() -> None:
    fields = kmeans(3).encode(X[:8], 0)
    with pytest.raises(PacketError, match="'centroid' holds a number that is not finite"):
        kmeans(3).decode({**fields, "centroid": torch.tensor([0, 1, torch.inf])}, 8, 0)
    with pytest.raises(PacketError, match="'code' names centroid 3 of 3"):
        kmeans(3).decode({**fields, "code": torch.tensor([0, 192], dtype=torch.uint8)}, 8, 0)
    with pytest.raises(ConfigError, match="leaves no float32 values"):
        kmeans | fp32
