"""What every codec of the table must do. The suite asks what a codec declares, never what it is called.

A new codec needs a line in EXAMPLES. Each check is a function of a codec, so that the last tests here can show that
it fails for a codec that lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from thinwire.codecs import CODECS, Codec, Traits, fp32, parse, require
from thinwire.errors import PacketError
from thinwire.packet import Fields, Layout, Packet, read, wire_bytes
from thinwire.randomness import mix

EXAMPLES: dict[str, list[str]] = {
    "fp32": ["fp32", "fp32 | int8", "fp32 | fp32"],
    "bf16": ["bf16"],
    "fp16": ["fp16"],
    "fp8": ["fp8", "fp8('e5m2', block=64)"],
    "int8": ["int8", "int8(block=64)", "int8(block=2)", "int8(rounding='stochastic')", "int8(grid='minmax')"],
    "int6": ["int6", "int6(grid='zero')"],
    "int4": ["int4", "int4(block=256)", "int4(block=64, rounding='stochastic')", "int4(grid='zero')",
             "int4(grid='minmax')"],
    "int3": ["int3", "int3(rounding='stochastic', grid='minmax')"],
    "int2": ["int2", "int2(grid='zero')", "int2(grid='minmax')", "int2(rounding='stochastic', grid='zero')"],
    "e4m0": ["e4m0"],
    "e3m0": ["e3m0", "e3m0(block=32)", "e3m0(rounding='stochastic')"],
    "e2m0": ["e2m0", "e2m0(block=16, rounding='stochastic')"],
    "natural": ["natural"],
    "qsgd": ["qsgd", "qsgd(1, block=64, norm='max')", "qsgd(16, block=128, code='elias')"],
    "terngrad": ["terngrad", "terngrad(block=64, clip=2.5, code='trits')"],
    "sign": ["sign", "sign(block=64, scale='two-means')", "topk(1/4) | sign(block=64)"],
    "topk": ["topk(1/64)", "topk(0.3)", "topk(1)", "topk(1/16) | int4", "topk(1/2) | topk(1/4) | e3m0",
             "topk(1/4) | int8(rounding='stochastic')", "topk(1/8, index='packed')", "topk(1/8, index='bitmap')",
             "topk(1/8, index='elias_fano')", "topk(1/8, index='int32')", "topk(1/16, index='smallest')",
             "topk(1/8, index='varint') | int4", "topk(0.1, block=64)",
             "topk(1/8, block=256, index='smallest') | int8"],
    "dct": ["dct(1/128)", "dct(0.3, chunk=8)", "dct(1)", "dct(1/16) | int8"],
    "rotation": ["rotation(block=64) | int4(rounding='stochastic')"],
    "hadamard": ["hadamard", "hadamard(bits=3, block=64, rounds=2)", "hadamard(bits=2, scale='least_squares')"],
    "projection": ["projection(100, per_block=4)", "projection(40, shrink=1)",
                   "projection(200, per_block=8, shared=True)", "projection(150, per_block=75) | int8"],
    "sketch": ["sketch(width=64)", "sketch(width=1000, rows=3, keep=20)"],
    "layers": ["layers(topk(1/16))", "layers(topk(1/4) | int4 | zstd)", "layers(int4, small=0)"],
    "kmeans": ["kmeans", "kmeans(3)", "kmeans(256)", "topk(0.1) | kmeans(2)"],
    "pq": ["pq", "pq(4, 16, stages=3, block=64)", "pq(2, 7, block=2)"],
    "cst": ["cst(16)", "cst(128, bits=2)", "cst(1, bits=8)"],
    "anchor_delta": ["anchor_delta(16)", "anchor_delta(3, layers=5, group=2)", "anchor_delta(8, bins=(0.2,)) | rans"],
    "rans": ["int8 | rans", "bf16 | rans(segment=100)", "topk(1/16, index='smallest') | kmeans(4) | rans"],
    "zstd": ["zstd", "bf16 | zstd(level=1)", "int8 | zstd(level=-5)", "topk(1/64) | int4 | zstd"],
    "randk": ["randk(1/8)", "randk(0.3, scaled=True)", "randk(1/2, scaled=True) | int8(rounding='stochastic')"],
    "rows": ["rows(1/8, width=16)", "rows(1/2) | int8", "rows(1/4, width=32, sampled=True)"],
}  # fmt: skip
CODEC_EXPRESSIONS = [expression for expressions in EXAMPLES.values() for expression in expressions]
LENGTHS = (0, 1, 7, 255, 256, 257, 1000)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DRAWS = 200
#: Blocks of smaller numbers than this may be written as zeros; no claim is held against them.
NEGLIGIBLE = 2.0**-120

every_codec = pytest.mark.parametrize("codec", [parse(e) for e in CODEC_EXPRESSIONS], ids=CODEC_EXPRESSIONS)


def _one_hot(n: int, g: torch.Generator) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(n // 2), n).float() if n else torch.zeros(0)


def _student(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g) / torch.randn(3, n, generator=g).square().mean(dim=0).sqrt()


def _laplace(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g).sign() * -torch.rand(n, generator=g).clamp(min=1e-30).log()


DATA: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "zeros": lambda n, g: torch.zeros(n),
    "one-hot": _one_hot,
    "constant": lambda n, g: torch.full((n,), -0.3),
    "signs": lambda n, g: torch.randn(n, generator=g).sign(),
    "normal": lambda n, g: torch.randn(n, generator=g),
    "laplace": _laplace,
    "student-t": _student,
    "log-normal": lambda n, g: torch.randn(n, generator=g).sign() * (2 * torch.randn(n, generator=g)).exp(),
    "sparse": lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.01),
    "denormal": lambda n, g: torch.randn(n, generator=g) * torch.tensor([1e-38, 1e-40, 1e-30]).repeat(n)[:n],
    "huge": lambda n, g: 1e30 * torch.randn(n, generator=g),
    "limit": lambda n, g: torch.randn(n, generator=g).sign() * torch.finfo(torch.float32).max,
}


def vectors(lengths: tuple[int, ...] = LENGTHS) -> Iterator[tuple[str, Tensor]]:
    for n in lengths:
        for name, make in DATA.items():
            yield f"{name}[{n}]", make(n, torch.Generator().manual_seed(n))


def same(a: Fields, b: Fields) -> bool:
    """Equal to the bit, minus zero and all."""
    return list(a) == list(b) and all(_bits(a[name]) == _bits(b[name]) for name in a)


def _bits(x: Tensor) -> tuple[torch.dtype, bytes]:
    plain = torch.empty(x.shape, dtype=x.dtype).copy_(x)
    return x.dtype, plain.view(torch.uint8).numpy().tobytes()


# The checks -----------------------------------------------------------------------------------------------------------


def check_round_trip(codec: Codec, x: Tensor) -> None:
    before = x.clone()
    fields = codec.encode(x, 5)
    kept = {name: field.clone() for name, field in fields.items()}
    decoded = codec.decode(fields, len(x), 5)
    assert decoded.dtype == torch.float32
    assert decoded.shape == x.shape
    assert decoded.isfinite().all()
    assert same({"x": x}, {"x": before}), "encode changed its input"
    assert same(fields, kept), "decode changed its input"


def check_layout(codec: Codec, x: Tensor) -> None:
    fields, layout = codec.encode(x, 5), codec.layout(len(x))
    assert list(fields) == list(layout)
    for name, (dtype, count) in layout.items():
        field = fields[name]
        assert field.dtype == dtype
        assert field.ndim == 1
        assert field.numel() == count if codec.traits.fixed_size else field.numel() <= count


def check_packet(codec: Codec, x: Tensor) -> None:
    fields, n = codec.encode(x, 5), len(x)
    sent = Packet(codec.spec, n, fields).to_bytes()
    due = wire_bytes(codec.spec, codec.layout(n))
    assert sent.numel() == due if codec.traits.fixed_size else sent.numel() <= due
    assert same({"x": codec.decode(read(sent).fields, n, 5)}, {"x": codec.decode(fields, n, 5)})


def check_determinism(codec: Codec, x: Tensor) -> None:
    assert same(codec.encode(x, 5), codec.encode(x.clone(), 5)), "equal input and key, other fields"
    strided = torch.stack([x, x + 1], dim=1).flatten()[::2]
    assert same(codec.encode(x, 5), codec.encode(strided, 5)), "a strided view is written otherwise than its copy"


def check_lossless(codec: Codec, x: Tensor) -> None:
    if codec.traits.lossless:
        assert same({"x": codec.decode(codec.encode(x, 5), len(x), 5)}, {"x": x})


def check_linear(codec: Codec, x: Tensor, y: Tensor) -> None:
    if not codec.traits.linear:
        return
    n = len(x)
    (name, a), (b,) = *codec.encode(x, 5).items(), codec.encode(y, 5).values()
    (c,) = codec.encode(x + 2 * y, 5).values()
    assert a.dtype == torch.float32
    # One rounding a term: the sums may be taken in another order, and terms may cancel in a code that holds several.
    terms = a.abs().max().item() + 2 * b.abs().max().item()
    torch.testing.assert_close(c, a + 2 * b, rtol=0, atol=2**-22 * terms)
    (due,) = codec.encode(x + y, 5).values()
    decoded, summed, first, second = (codec.decode({name: code}, n, 5) for code in (due, a + b, a, b))
    # Codes may be elements times a constant: what is decoded is as large as it is.
    terms = max(terms, first.abs().max().item() + 2 * second.abs().max().item())
    torch.testing.assert_close(summed, decoded, rtol=0, atol=2**-22 * terms)


def check_bounds(codec: Codec, x: Tensor, draws: int = DRAWS) -> None:
    """The mean of ||C(x) - x||^2 over keys keeps to what is claimed, up to 5 standard errors of the mean."""
    delta, omega, n = codec.contraction(len(x)), codec.variance(len(x)), len(x)
    x = _within_range(codec, x)
    if codec.traits.wants_feedback:
        assert delta is not None
        assert delta > 0, "error feedback converges with contractive codecs only"
    if omega is not None:
        assert codec.traits.unbiased, "omega is claimed by unbiased codecs"
    if delta is None and omega is None:
        return
    exact = x.double()
    errors = torch.stack([(d.double() - exact).square().sum() for d in _decoded(codec, x, draws)])
    found = errors.mean().item() - 5 * _standard_error(errors)
    energy, spared = exact.square().sum().item(), n * NEGLIGIBLE**2
    for bound in ([] if delta is None else [1 - delta]) + ([] if omega is None else [omega]):
        # Equality is reached (topk of a constant), so that the float64 sums' own rounding must be let through.
        assert found <= (bound + 1e-12) * energy + spared, (
            f"{errors.mean().item() / energy} of the energy, claimed {bound}"
        )


def check_unbiased(codec: Codec, x: Tensor, draws: int = DRAWS) -> None:
    """The mean over keys of projections of C(x) - x is 0, up to 5 standard errors and the resolution of the dither.

    Projections on x's signs (shrinking), on ones (drift) and on random signs: sums over many elements, so that their
    spread over keys is known well from a few hundred draws.
    """
    if not codec.traits.unbiased or not len(x):
        return
    x = _within_range(codec, x)
    g = torch.Generator().manual_seed(1)
    onto = torch.stack([x.sign(), torch.ones_like(x), *torch.randn(3, len(x), generator=g).sign()]).double()
    errors = torch.stack([onto @ (d.double() - x.double()) for d in _decoded(codec, x, draws)])
    resolution = len(x) * (2.0**-16 * x.abs().max().item() + NEGLIGIBLE)
    for projection in errors.T:
        assert abs(projection.mean().item()) <= 5 * _standard_error(projection) + resolution


def _within_range(codec: Codec, x: Tensor) -> Tensor:
    """x, or a smaller one of which what arrives is within float32.

    What an unbiased sparsifier keeps is 1 + omega times as large as it was; noise that a rotation spreads is on top.
    """
    omega = codec.variance(len(x))
    return x if omega is None or omega < 1 / 4 or not len(x) else x / (1 + omega + 6 * omega**0.5)


def check_refusals(codec: Codec, x: Tensor) -> None:
    n, fields = len(x), dict(codec.encode(x, 5))
    last = list(fields)[-1]
    wrong: list[tuple[Fields, int]] = [
        *((fields, other) for other in (2 * n + 300, 0) if codec.layout(other) != codec.layout(n)),
        ({name: field for name, field in fields.items() if name != last}, n),
        ({**fields, "surplus": fields[last]}, n),
        ({}, n),
        *(({**fields, name: fields[name].double()}, n) for name in fields),
        *(({**fields, name: fields[name][:-1]}, n) for name in fields if fields[name].numel()),
        *(({**fields, name: fields[name].unsqueeze(0)}, n) for name in fields),
    ]
    for bad, length in wrong:
        with pytest.raises(PacketError):
            codec.decode(bad, length, 5)


def check_any_bytes(codec: Codec, x: Tensor) -> None:
    """Fields of the right lengths with any content decode to n float32 numbers or are refused."""
    g = torch.Generator().manual_seed(3)
    fields = codec.encode(x, 5)
    for trial in range(60):
        mutated = {name: _mutated(field, g, everything=trial % 4 == 0) for name, field in fields.items()}
        try:
            decoded = codec.decode(mutated, len(x), 5)
        except PacketError:
            continue
        assert decoded.shape == x.shape
        assert decoded.dtype == torch.float32


def _mutated(field: Tensor, g: torch.Generator, *, everything: bool) -> Tensor:
    raw = field.clone().contiguous().view(torch.uint8)
    count = len(raw) if everything else min(1, len(raw))
    where = torch.randint(max(1, len(raw)), (count,), generator=g)
    raw[where] = torch.randint(256, (count,), generator=g, dtype=torch.uint8)
    return raw.view(field.dtype)


def _decoded(codec: Codec, x: Tensor, draws: int) -> list[Tensor]:
    """C(x) for as many keys; for one, if the codec does not look at the key."""
    probe = torch.linspace(-1, 1, 999)
    random = not same(codec.encode(probe, mix(0)), codec.encode(probe, mix(1)))
    return [codec.decode(codec.encode(x, mix(i)), len(x), mix(i)) for i in range(draws if random else 1)]


def _standard_error(samples: Tensor) -> float:
    return samples.std().item() / math.sqrt(len(samples)) if len(samples) > 1 else 0.0


# The table ------------------------------------------------------------------------------------------------------------


def test_every_table_entry_has_an_example() -> None:
    assert set(EXAMPLES) == set(CODECS)
    assert all(any(name in expression for expression in EXAMPLES[name]) for name in CODECS)


@every_codec
def test_expression(codec: Codec) -> None:
    assert parse(codec.spec) == codec
    assert parse(codec.spec).spec == codec.spec
    assert hash(parse(codec.spec)) == hash(codec)


@every_codec
def test_round_trip(codec: Codec) -> None:
    for _, x in vectors():
        check_round_trip(codec, x)


@every_codec
def test_size(codec: Codec) -> None:
    for _, x in vectors():
        check_layout(codec, x)
        check_packet(codec, x)


@every_codec
def test_determinism(codec: Codec) -> None:
    for _, x in vectors():
        check_determinism(codec, x)


@every_codec
def test_number_of_threads_makes_no_difference(codec: Codec) -> None:
    before = torch.get_num_threads()
    x = DATA["student-t"](100_003, torch.Generator().manual_seed(0))
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            fields = codec.encode(x, 5)
            results.append({**fields, "decoded": codec.decode(fields, len(x), 5)})
    finally:
        torch.set_num_threads(before)
    assert same(*results)
    check_layout(codec, x)
    check_packet(codec, x)


@every_codec
@pytest.mark.parametrize("device", DEVICES)
def test_every_device_writes_and_reads_the_same(codec: Codec, device: str) -> None:
    for _, x in vectors((0, 257, 1000)):
        fields = codec.encode(x.to(device), 5)
        assert {field.device.type for field in fields.values()} <= {device}
        assert same(fields, codec.encode(x, 5))
        decoded = codec.decode(fields, len(x), 5)
        assert decoded.device.type == device
        assert same({"x": decoded}, {"x": codec.decode(codec.encode(x, 5), len(x), 5)})


@every_codec
def test_lossless_and_linear(codec: Codec) -> None:
    for _, x in vectors():
        check_lossless(codec, x)
    check_linear(codec, *(DATA["normal"](1000, torch.Generator().manual_seed(i)) for i in (1, 2)))


@every_codec
def test_bounds(codec: Codec) -> None:
    for _, x in vectors((0, 1, 7, 257)):
        check_bounds(codec, x)


@every_codec
def test_unbiased(codec: Codec) -> None:
    for _, x in vectors((0, 1, 257)):
        check_unbiased(codec, x)


@every_codec
def test_refusals(codec: Codec) -> None:
    for length in (7, 257, 1000):
        check_refusals(codec, DATA["normal"](length, torch.Generator().manual_seed(0)))


@every_codec
def test_any_bytes(codec: Codec) -> None:
    for length in (1, 7, 300):
        check_any_bytes(codec, DATA["normal"](length, torch.Generator().manual_seed(0)))


# The checks can fail --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made(Codec):
    """A codec of loose parts, to declare one thing and do another."""

    write: Callable[[Tensor, int], Tensor] = lambda x, key: x
    promises: Traits = fp32.traits
    claims: float | None = None
    size: Callable[[int], int] = lambda n: n
    checked: bool = True

    @property
    def spec(self) -> str:
        return "made"

    @property
    def traits(self) -> Traits:
        return self.promises

    def layout(self, n: int) -> Layout:
        return {"value": (torch.float32, self.size(n))}

    def encode(self, x: Tensor, key: int) -> Fields:
        return {"value": self.write(x, key)}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        if self.checked:
            require(fields, {"value": (torch.float32, n)})
        return next(iter(fields.values()))[:n]

    def contraction(self, n: int) -> float | None:
        return self.claims

    def variance(self, n: int) -> float | None:
        return None


X = torch.linspace(-1, 2, 1000)
LOSSY = Traits(unbiased=True)


def _whole_numbers(x: Tensor, key: int) -> Tensor:
    return x.round()


def _at_random(x: Tensor, key: int) -> Tensor:
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(key % 2**31))
    return (x + noise).floor()


HONEST = [Made(), Made(_at_random, LOSSY), Made(_at_random, replace(LOSSY, unbiased=False))]
LIARS: dict[str, tuple[Made, Callable[[Codec], None]]] = {
    "lossless": (Made(_whole_numbers), lambda c: check_lossless(c, X)),
    "linear": (Made(_whole_numbers), lambda c: check_linear(c, X, X.square())),
    "unbiased, though it rounds": (Made(_whole_numbers, LOSSY), lambda c: check_unbiased(c, X)),
    "unbiased, though it shrinks": (
        Made(lambda x, key: 0.98 * _at_random(x, key), LOSSY),
        lambda c: check_unbiased(c, X),
    ),
    "contraction": (Made(_whole_numbers, LOSSY, claims=0.999), lambda c: check_bounds(c, X)),
    "contraction in the mean": (Made(_at_random, LOSSY, claims=0.9), lambda c: check_bounds(c, X)),
    "feedback without contraction": (Made(promises=Traits(wants_feedback=True)), lambda c: check_bounds(c, X)),
    "size": (Made(size=lambda n: n + 1), lambda c: check_layout(c, X)),
    "bytes": (Made(size=lambda n: n + 2), lambda c: check_packet(c, X)),
    "determinism": (Made(lambda x, key: x + torch.rand(())), lambda c: check_determinism(c, X)),
    "input": (Made(lambda x, key: x.mul_(2)), lambda c: check_round_trip(c, X.clone())),
    "finite": (Made(lambda x, key: x / 0), lambda c: check_round_trip(c, X)),
}


@pytest.mark.parametrize("lie", LIARS)
def test_a_codec_that_lies_is_caught(lie: str) -> None:
    codec, check = LIARS[lie]
    with pytest.raises(AssertionError):
        check(codec)


def test_a_codec_that_believes_any_packet_is_caught() -> None:
    with pytest.raises(pytest.fail.Exception):
        check_refusals(Made(checked=False), X)


@pytest.mark.parametrize("codec", HONEST)
def test_an_honest_one_is_not(codec: Codec) -> None:
    check_round_trip(codec, X)
    check_layout(codec, X)
    check_packet(codec, X)
    check_determinism(codec, X)
    check_lossless(codec, X)
    check_linear(codec, X, X.square())
    check_bounds(codec, X)
    check_unbiased(codec, X)
    check_refusals(codec, X)
