"""Any tensor to a packet and back, with every codec there is; and the tensors that are refused."""

from __future__ import annotations

import pytest
import torch
from test_codecs import CODEC_EXPRESSIONS

from thinwire.codecs import decode, encode, feedback, fp32, int4, int8, parse, topk
from thinwire.codecs.base import Codec
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import read, wire_bytes

every_codec = pytest.mark.parametrize("codec", [parse(e) for e in CODEC_EXPRESSIONS], ids=CODEC_EXPRESSIONS)
SHAPES = [(), (0,), (1,), (3, 0, 2), (5, 7), (2, 3, 4, 5), (70, 40)]


@every_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_shape_and_float(codec: Codec, dtype: torch.dtype) -> None:
    """What comes back is what the codec makes of the flat float32 vector; bytes are those declared."""
    g = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        x = torch.randn(shape, generator=g).to(dtype)
        packet = encode(x, codec, key=3)
        back = decode(read(packet.to_bytes()), codec, shape=shape, key=3)
        assert back.shape == x.shape
        assert back.dtype == torch.float32
        fitted = codec.fit((shape,))
        flat = x.float().reshape(-1)
        assert torch.equal(back.reshape(-1), fitted.decode(fitted.encode(flat, 3), len(flat), 3))
        due = wire_bytes(codec.spec, fitted.layout(x.numel()))
        assert len(packet.to_bytes()) == due if codec.traits.fixed_size else len(packet.to_bytes()) <= due


@every_codec
def test_strides_make_no_difference(codec: Codec) -> None:
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    plain, turned = encode(x.t().contiguous(), codec), encode(x.t(), codec)
    assert torch.equal(plain.to_bytes(), turned.to_bytes())
    sliced = torch.stack([x, x], dim=2)[..., 0]
    assert torch.equal(encode(x, codec).to_bytes(), encode(sliced, codec).to_bytes())


def test_a_leaf_that_wants_gradients_may_be_written() -> None:
    assert not decode(encode(torch.ones(3, requires_grad=True), fp32), fp32, shape=(3,)).requires_grad


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (
            torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]]),
            r"2 values .* not finite, the first, nan, at \(1, 0\)",
        ),
        (torch.tensor(-torch.inf), r"1 values that are not finite, the first, -inf, at \(\)"),
        (torch.ones(3, dtype=torch.float64), "a tensor of torch.float64\n  expected  float32, bfloat16 or float16"),
        (torch.ones(3, dtype=torch.int64), "a tensor of torch.int64"),
        (torch.ones(3, dtype=torch.complex64), "a tensor of torch.complex64"),
        (torch.eye(3).to_sparse(), "a tensor of layout torch.sparse_coo\n  expected  a dense tensor"),
    ],
)
def test_what_cannot_be_written_is_refused(x: torch.Tensor, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        encode(x, int8)


def test_sums_that_overflow_are_finite_all_the_same() -> None:
    x = torch.full((4,), torch.finfo(torch.float32).max)
    assert torch.equal(decode(encode(x, fp32), fp32, shape=(4,)), x)


def test_a_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ErrorFeedback\(.* is to write a tensor\n  expected  a codec"):
        encode(torch.ones(3), feedback(topk(1 / 2)))  # type: ignore[arg-type]


def test_packets_of_another_codec_or_size_are_refused() -> None:
    packet = encode(torch.ones(6), int8)
    with pytest.raises(PacketError, match="written with codec 'int8'\n  expected  codec 'int4'"):
        decode(packet, int4, shape=(6,))
    with pytest.raises(PacketError, match=r"a packet of 6 elements\n  expected  8 elements, shape \(2, 4\)"):
        decode(packet, int8, shape=(2, 4))
