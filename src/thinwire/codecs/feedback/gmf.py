"""Global momentum fusion: what all members are moving counts in what each of them selects.

    u <- m u + x,  v <- v + u                               as in dgc
    z = |(1 - tau) v / ||v|| + tau M / ||M|||
    send v where z is largest;  v' = v - C(v), u' = 0 there, as in dgc
    M <- beta M + mean C(v)                                 the first M is the first mean

Members whose data differ agree more on where to send, so that their sum has fewer entries. What is sent is v, not z.

State   own: u and v; shared: M, and the number of rounds; float32 [n] each. A member that a round did not count keeps u
        and v, and takes the others' mean into M. One that joins begins with the others' M.
Error   tau=0 is dgc to the bit.
Cost    dgc's, one more selection, three passes; 12n bytes of memory.
Source  Kuo, Kuo & Lin 2022, arXiv:2211.09320, and their repository global-momentum-fusion-fl: tau to 0.6 in ten equal
        stages over 220 rounds, beta 0.9. The sum is that of their older code; a newer one adds magnitudes.
Differs `rounds` spreads their ten stages, stage s at tau s / 9, of which they round the third digit up. As dgc: v keeps
        what the codec rounded off.
Avoid   where members' data are alike: dgc does the same with less memory and one selection less; and a large tau from
        the start, with which the entries chosen first stay chosen while all others wait: let it rise over `rounds`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.codecs.base import Codec
from thinwire.codecs.feedback.base import Feedback, Place, check_codec
from thinwire.codecs.feedback.dgc import accumulate, check_momentum, left_over
from thinwire.codecs.options import call, changed, check_number, is_whole
from thinwire.codecs.stages import Staged, Tensors
from thinwire.codecs.topk import TopK
from thinwire.errors import ConfigError

_STAGES = 10


@dataclass(frozen=True)
class GMF(Feedback):
    """DGC's memory with a selection that looks at the global momentum.

    codec     topk, or a chain that begins with it
    tau       weight of the global momentum in the selection, in [0, 1)
    momentum  m above, in [0, 1)
    beta      of the global momentum, in [0, 1)
    rounds    over which tau rises from 0 in ten stages; 0 has it from the second round on
    """

    codec: Codec | Staged
    tau: float = 0.6
    momentum: float = 0.9
    beta: float = 0.9
    rounds: int = 0

    def __post_init__(self) -> None:
        check_number("gmf", "with tau", self.tau, at_least=0, below=1, mend="0.6 is the authors' value, 0 is dgc")
        check_momentum("gmf", self.momentum)
        check_number("gmf", "with beta", self.beta, at_least=0, below=1, mend="0.9 is the authors' value")
        if not is_whole(self.rounds, 0):
            raise ConfigError(
                f"gmf is to raise tau over {self.rounds!r} rounds",
                expected="a whole number, at least 0",
                mend="leave it out to have all of it from the second round on",
            )
        check_codec("gmf", self.codec, needs="selection")
        if not (isinstance(self.codec, Codec) and all(isinstance(codec, TopK) for codec in self.codec.leads)):
            raise ConfigError(
                f"gmf around {self.codec.spec}: it does not select by magnitude",
                expected="topk, or a chain that begins with it",
                mend="write gmf(topk(1/64)), or dgc(...) around this codec",
            )

    @property
    def spec(self) -> str:
        return call("gmf", self.codec.spec, **changed(self))

    @property
    def accelerates(self) -> bool:
        return self.momentum > 0

    def prepare(self, x: Tensor, own: Tensors, shared: Tensors, place: Place) -> tuple[Tensor, Tensors]:
        accumulated, held = accumulate(x, own, self.momentum, nesterov=False)
        # v itself is needed after the round: the target is v at the chosen entries alone, so that topk takes those.
        return self._chosen(accumulated, shared), {**held, "all": accumulated}

    def commit(self, target: Tensor, held: Tensors, sent: Tensor) -> Tensors:
        return left_over(held["all"], held, sent, masking=True)

    def receive(self, combined: Tensor, shared: Tensors, share: float) -> tuple[Tensor, Tensors]:
        # A product and a sum, rounded one by one: shared state is to be alike on all processors.
        moved = combined + shared["global"] * self.beta if shared else combined
        rounds = shared["rounds"] if shared else torch.zeros((), dtype=torch.int64)
        return combined, {"global": moved, "rounds": rounds + 1}

    def _chosen(self, accumulated: Tensor, shared: Tensors) -> Tensor:
        """v [n] where the score is largest, zero elsewhere; all of v where the score would choose as topk does."""
        tau = self._tau(shared)
        norm, speed = (_norm(accumulated), _norm(shared["global"])) if tau else (0.0, 0.0)
        if not (norm and speed):
            return accumulated
        assert isinstance(self.codec, Codec)
        score = (accumulated * ((1 - tau) / norm)).add_(shared["global"], alpha=tau / speed)  # its sign is no matter
        selection = self.codec.selection
        kept = selection.decode(selection.encode(score, 0), len(score), 0)
        return accumulated.where(kept != 0, 0.0)

    def _tau(self, shared: Tensors) -> float:
        """In force now: nothing is fused before there is a global momentum."""
        if not shared:
            return 0.0
        if not self.rounds:
            return self.tau
        stage = min(_STAGES * int(shared["rounds"]) // self.rounds, _STAGES - 1)
        return self.tau * stage / (_STAGES - 1)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


gmf = GMF
