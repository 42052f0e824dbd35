"""What the lossless stages share: a field of any type as rows of bytes, and back.

Bytes are grouped by position (all first bytes, all second bytes, ...): numbers of like size share their exponents, so
what repeats stands side by side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.codecs.base import Codec
from thinwire.errors import ConfigError

Bytes = npt.NDArray[np.uint8]


def check_left(stage: str, inner: Codec) -> None:
    """Refuse a lossless stage after another one."""
    if inner.squeezes:
        raise ConfigError(
            f"{inner.spec} | {stage}: the left side already writes as few bytes as it can",
            expected=f"a codec that squeezes no bytes before {stage}",
            mend="use one such stage, at the end",
        )


def planes(field: Tensor) -> Bytes:
    """The bytes of a field of any dtype by their position, on the CPU.  uint8 [bytes an element, elements]"""
    # A tensor of one element counts as contiguous whatever its stride, but view(uint8) looks at the stride.
    flat = field.detach().contiguous().as_strided(field.shape, (1,))
    raw = flat.view(torch.uint8).view(-1, field.element_size())
    return raw.t().contiguous().cpu().numpy()


def from_planes(rows: Bytes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The inverse of `planes`; the field keeps no hold on `rows` unless elements have one byte."""
    return torch.from_numpy(rows).t().contiguous().view(-1).view(dtype).to(device)
