"""Error feedback: send with this round's vector what the codec dropped in earlier rounds.

    p = x + decay e        e' = p - C(p)

State   own: the residual e, float32 [n]; nothing shared. With decay=1 nothing is ever lost: the sum of what was decoded
        plus the last residual is the sum of what was given.
Error   converges with any contractive C, at the rate of exact SGD but for a higher-order term; with a constant step and
        members whose data differ it stops at a distance in proportion to the step.
Cost    one decoding and two passes a round, 4n bytes of memory.
Source  Seide et al. 2014 (1-bit SGD, Interspeech); Stich, Cordonnier & Jaggi 2018, arXiv:1809.07599, Alg. 1;
        Karimireddy et al. 2019, arXiv:1901.09847, Alg. 2 (EF-SGD, "EF14" in later papers).
Differs the learning rate is not in here: for gradients the residual is in gradient units, so a change of the learning
        rate changes what an old residual is worth; pseudo-gradients are in parameter units and have no such trouble.
Avoid   around unbiased codecs with large variance, which do not contract, and where a member takes part only once in a
        while: its residual is out of date by then.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thinwire.codecs.base import Codec
from thinwire.codecs.feedback.base import Feedback, Place, check_codec
from thinwire.codecs.options import call, changed, is_number
from thinwire.codecs.stages import Staged, Tensors
from thinwire.errors import ConfigError


@dataclass(frozen=True)
class ErrorFeedback(Feedback):
    """The classic residual memory.

    codec  what writes the sum
    decay  factor on the residual before it is added, in [0, 1]; 1 forgets nothing, 0 is no feedback
    """

    codec: Codec | Staged
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not (is_number(self.decay) and 0 <= self.decay <= 1):
            raise ConfigError(
                f"feedback is to keep {self.decay!r} of the residual from round to round",
                expected="decay between 0 (no feedback) and 1 (forget nothing)",
                mend="leave it out for 1",
            )
        check_codec("feedback", self.codec, needs="contractive" if self.decay else "")

    @property
    def spec(self) -> str:
        return call("feedback", self.codec.spec, **changed(self))

    @property
    def keeps(self) -> float:
        return self.decay

    def prepare(self, x: Tensor, own: Tensors, shared: Tensors, place: Place) -> tuple[Tensor, Tensors]:
        return x.add(own["residual"], alpha=self.decay) if "residual" in own else x, {}

    def commit(self, target: Tensor, held: Tensors, sent: Tensor) -> Tensors:
        return {"residual": target - sent}


feedback = ErrorFeedback
