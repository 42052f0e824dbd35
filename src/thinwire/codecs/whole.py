"""Any tensor to a packet and back: codecs for those who have a tensor and a link of their own.

    >>> import torch
    >>> from thinwire.codecs import decode, encode, int8
    >>> from thinwire.packet import read
    >>> x = torch.linspace(-1, 1, 6).reshape(2, 3)
    >>> message = encode(x, int8).to_bytes()  # uint8, what crosses the link
    >>> decode(read(message), int8, shape=(2, 3)).sub(x).abs().max() < 0.005
    tensor(True)

A codec itself sees flat, finite float32 vectors; here is where everything else is made into one, or refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.codecs.base import Codec
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Packet

_WRITTEN = (torch.float32, torch.bfloat16, torch.float16)


def encode(x: Tensor, codec: Codec, *, key: int = 0) -> Packet:
    """Write a tensor.

    x        float32, bfloat16 or float16, any shape and strides, finite; not changed
    codec    how; not error feedback, which has a memory, nor a round of several exchanges
    key      64-bit; shared randomness, the same as given to `decode`
    returns  a packet; its `to_bytes()` is what crosses a link. Until then it may share memory with x (fp32 does)
    raises   ConfigError for a tensor that cannot be written, naming what is wrong with it
    """
    _check_codec(codec)
    if x.layout != torch.strided:
        raise ConfigError(f"a tensor of layout {x.layout}", expected="a dense tensor", mend="x.to_dense()")
    if x.dtype not in _WRITTEN:
        raise ConfigError(
            f"a tensor of {x.dtype}",
            expected="float32, bfloat16 or float16: codecs work on float32 and would lose the rest",
            mend="x.float(), if that loses nothing you need",
        )
    flat = x.detach().reshape(-1).float()
    if not bool(flat.sum().isfinite()) and not bool(flat.isfinite().all()):
        wrong = (~flat.isfinite()).nonzero().squeeze(1)
        place = tuple(int(i) for i in torch.unravel_index(wrong[0], x.shape)) if x.ndim else ()
        raise ConfigError(
            f"a tensor with {len(wrong)} values that are not finite, the first, {float(flat[wrong[0]])}, at {place}",
            expected="finite values: one that is not would spoil every value that shares its scale",
            mend="leave this tensor out of the round, or torch.nan_to_num(x) if zeros may stand for them",
        )
    return Packet(codec.spec, flat.numel(), codec.fit((tuple(x.shape),)).encode(flat, key))


def decode(packet: Packet, codec: Codec, *, shape: Sequence[int], key: int = 0) -> Tensor:
    """Read a tensor.

    packet   from `encode`, or `packet.read` of bytes that arrived
    codec    what it was written with; a packet is not believed
    shape    of the tensor that was written
    key      that `encode` was given
    returns  float32, of this shape, on the fields' device
    raises   PacketError if the packet is of another codec or size, or cannot come from `encode`
    """
    _check_codec(codec)
    n = math.prod(shape)
    if packet.codec != codec.spec:
        raise PacketError(f"a packet written with codec {packet.codec!r}", expected=f"codec {codec.spec!r}")
    if packet.n != n:
        raise PacketError(f"a packet of {packet.n} elements", expected=f"{n} elements, shape {tuple(shape)}")
    return codec.fit((tuple(shape),)).decode(packet.fields, n, key).reshape(tuple(shape))


def _check_codec(codec: object) -> None:
    if not isinstance(codec, Codec):
        raise ConfigError(
            f"{codec!r} is to write a tensor",
            expected="a codec, or a chain of them; feedback and rounds of several exchanges belong in a Method",
            mend='parse("topk(1/64) | int8"), or the codec inside the feedback',
        )
