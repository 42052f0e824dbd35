"""SPARTA (sparse parameter averaging): every step, the mean of a few parameters drawn at random; optimizers stay alone.

    M of p n entries, drawn alike by all;  theta_i[M] <- mean_j theta_j[M]    every H local steps, H=1 in the paper

Members' models stay apart, by as much as p lets them: the one to use is their mean (Synchronizer.evaluating).

Error   p=1 is averaging of the models. After T rounds an entry has been averaged with probability 1 - (1 - p)^T.
Size    2 (N-1)/N * 4pn bytes sent per member and round with fp32; which entries is never sent.
State   the anchor, which holds the last mean of every entry, alike on all members. Optimizers' moments stay local and
        are kept, those of averaged entries too.
Source  exo labs 2025 (SPARTA, a report without arXiv id): p from 5e-4 to 5e-3, every step.
Differs entries are drawn one from each of p n strata (thinwire.codecs.randk), so no layer is left out. A mean
        that arrives late (schedule=Every(10, overlap=9)) goes under the local steps made since, not over them.
Combine with DiLoCo's outer step by two `synchronize` around one loop: diloco every few hundred steps, sparta between.
"""

from __future__ import annotations

from thinwire.codecs import Codec, ErrorFeedback, randk
from thinwire.method import Method
from thinwire.outer import Patch
from thinwire.payloads import Delta
from thinwire.schedules import Every


def sparta(*, share: float = 0.005, every: int = 1, codec: Codec | None = None) -> Method:
    """Average a share of the parameters.

    share  of the entries, in (0, 1]; p
    codec  what selects and writes, instead of randk(share): randk(0.01) | bf16
    """
    writes = randk(share) if codec is None else codec
    # What is not sent is still in the parameters: there is nothing to remember.
    bare = ErrorFeedback(writes, decay=0.0) if writes.traits.wants_feedback else writes
    return Method(schedule=Every(every), payload=Delta(), codec=bare, outer=Patch())
