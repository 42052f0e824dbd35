"""Error feedback: send with this round's vector what the codec dropped in earlier rounds.

    p = x + decay e        e' = p - C(p)

State   the residual e, float32 [n], held by the caller; it starts as None (zero). With decay=1 nothing is ever lost:
        the sum of what was decoded plus the last residual is the sum of what was given.
Error   converges with any contractive C, at the rate of exact SGD but for a higher-order term.
Cost    one decoding and two passes a round, 4n bytes of memory.
Source  Seide et al. 2014 (1-bit SGD, Interspeech); Stich, Cordonnier & Jaggi 2018, arXiv:1809.07599, Alg. 1;
        Karimireddy et al. 2019, arXiv:1901.09847, Alg. 2 (EF-SGD, "EF14" in later papers).
Differs the learning rate is not in here: for gradients the residual is in gradient units, so a change of the learning
        rate changes what an old residual is worth; pseudo-gradients are in parameter units and have no such trouble.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from thinwire.codecs.base import Codec
from thinwire.errors import ConfigError
from thinwire.packet import Fields


@dataclass(frozen=True)
class ErrorFeedback:
    """A memory around a codec; no codec itself, since it has state.

    codec  what writes the sum
    decay  factor on the residual before it is added, in [0, 1]; 1 forgets nothing, 0 is no feedback
    """

    codec: Codec
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.codec, Codec):
            raise ConfigError(
                f"feedback around {self.codec!r}",
                expected="a codec, or a chain of them",
                mend="write feedback(topk(1/64) | int4), one feedback around the whole chain",
            )
        number = isinstance(self.decay, int | float) and not isinstance(self.decay, bool)
        if not (number and 0 <= self.decay <= 1):
            raise ConfigError(
                f"feedback is to keep {self.decay!r} of the residual from round to round",
                expected="decay between 0 (no feedback) and 1 (forget nothing)",
                mend="leave it out for 1",
            )

    @property
    def spec(self) -> str:
        """Canonical expression; `thinwire.codecs.parse(feedback.spec) == feedback`."""
        decay = "" if self.decay == 1 else f", decay={self.decay!r}"
        return f"feedback({self.codec.spec}{decay})"

    def encode(self, x: Tensor, residual: Tensor | None, key: int) -> tuple[Fields, Tensor]:
        """Write a vector and what is left of earlier ones.

        x         float32 [n], finite; not changed
        residual  float32 [n], as the last committed round returned it, or None before the first; not changed
        key       as for Codec.encode
        returns   the codec's fields, and the new residual [n]; keep the old one if the round fails
        """
        target = x if residual is None else x.add(residual, alpha=self.decay)
        fields = self.codec.encode(target, key)
        return fields, target - self.codec.decode(fields, len(x), key)

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        """Read a vector: float32 [n]; the codec's own decoding."""
        return self.codec.decode(fields, n, key)

    def __or__(self, then: object) -> NoReturn:
        raise ConfigError(
            f"{self.spec} | ...: what follows would be outside the error memory",
            expected="feedback around the whole chain",
            mend=f"write feedback({self.codec.spec} | ...)",
        )


feedback = ErrorFeedback
