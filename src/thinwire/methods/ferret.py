"""Ferret: first-order local steps, their sum projected on seeded directions, coefficients sent, the sum rebuilt by all.

    c_i = f V_i^T (a - theta_i),  a <- a - eta mean_i V_i c_i / d,  theta_i <- a    every H local steps, block by block

V_i follows from the round and the member, so that nobody sends it; projection.py says what it is, and how many of the
coefficients each block gets.

Error   with as many coefficients as elements it is federated averaging of the models, up to rounding. With shrink=1,
        the default, each member's update is projected orthogonally: never longer than it was, K/d of it in the mean.
        With shrink=0 it is unbiased, and its noise sqrt(d/K) times as long as itself: then eta must be about K/d, or
        the mean be over d/K members. shrink=N, the number of members, is between the two.
Size    (N-1) (4k + 4L) bytes sent per member and round, whatever the size of the model, for L <= k/32 blocks; about
        half of it with `| bf16`, a quarter with `| int8`. projection(k, shared=True) adds up on the way:
        2 (N-1)/N 4k bytes, but averaging no longer lowers the projection's noise.
State   anchor a, alike on all members; inner optimizers' moments stay local and are kept.
Source  Shu et al. 2024, arXiv:2409.06277 (Ferret), and its published code: K=4096, plain SGD with lr=1e-4 for up to 200
        steps inside, 12 rounds, eta annealed.
Differs the paper's is unbiased, with what it costs in the size of eta. No clipping of what is rebuilt, at a norm of 10
        a direction in theirs. Its code draws the same vectors in every block and misses a factor of 3, which eta hides.
        There is no server. What projection.py does otherwise is told there.
Combine with what is dropped being remembered: codec=feedback(projection(4096, shrink=1)).
Avoid   inside Adam or another outer step that divides by the size of an update: it would divide by that of the noise.
"""

from __future__ import annotations

from thinwire.codecs import Codec, ErrorFeedback, projection
from thinwire.method import Method
from thinwire.outer import SGD
from thinwire.payloads import Delta
from thinwire.schedules import Every


def ferret(
    *,
    every: int = 50,
    outer_lr: float = 1.0,
    codec: Codec | ErrorFeedback = projection(4096, shrink=1),  # noqa: B008 (a frozen value)
) -> Method:
    """One plain outer step every `every` local steps (T in the paper) on the mean of rebuilt updates.

    codec  without a memory unless it is given one: feedback(projection(4096, shrink=1))
    """
    if isinstance(codec, Codec) and codec.traits.wants_feedback:
        codec = ErrorFeedback(codec, decay=0)
    return Method(schedule=Every(every), payload=Delta(), codec=codec, outer=SGD(outer_lr))
