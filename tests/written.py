"""What a codec makes of a vector, in a line."""

from __future__ import annotations

from torch import Tensor

from thinwire.codecs import Codec
from thinwire.packet import Fields


def again(codec: Codec, x: Tensor, key: int = 0) -> Tensor:
    """What others read of x, of any shape."""
    return codec.decode(codec.encode(x.view(-1), key), x.numel(), key).view_as(x)


def size(fields: Fields) -> int:
    """Bytes."""
    return sum(field.numel() * field.element_size() for field in fields.values())
