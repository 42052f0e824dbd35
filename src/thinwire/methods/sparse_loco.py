"""SparseLoCo: the largest entries of what has gathered, in two bits; a memory that fades is the outer momentum.

    e_i <- beta e_i + (a - theta_i),  q_i = C(e_i),  e_i <- e_i - q_i,  a <- a - eta mean_i q_i,  theta_i <- a
                                                                                              every H local steps

C keeps the k entries of largest magnitude in each chunk of 4096 and writes them as one of four values.

Error   C = fp32 is federated averaging of the models. With beta=1 nothing is lost: what was sent and what waits add up
        to all that was done. Below 1 an entry that is never among the largest fades, as it would from a momentum.
Size    (N-1) c(n) bytes sent per member and round, c(n) what the codec writes for n elements: 0.16 bits an element at
        a 64th and two bits, against 32.
State   anchor a, alike on all members; e of every member's own. No outer momentum.
Source  Sarfi, Thérien, Lidin & Belilovsky 2025, arXiv:2508.15706: 1 to 3 % of the entries, two bits, AdamW inside,
        plain outer steps. H=30, beta=0.95, eta=1 and 64 of 4096 are from others' ports of it, not from the paper.
Differs a chunk is 4096 consecutive entries of the fragment, theirs a tile of 64 x 64 of one matrix. The four values are
        means fitted to all that is sent (kmeans), where theirs are the means of fixed intervals. Positions are written
        in as few bits as are known beforehand, theirs in 12.
Avoid   with few rounds: an entry waits for its turn. After 5 rounds of 20 AdamW steps a GPT of 0.2 M parameters was at
        3.44 nats a byte, where DiLoCo was at 2.65.
"""

from __future__ import annotations

from thinwire.codecs import Codec, ErrorFeedback, kmeans, topk
from thinwire.method import Method
from thinwire.outer import SGD
from thinwire.payloads import Delta
from thinwire.schedules import Every


def sparse_loco(
    *,
    every: int = 30,
    outer_lr: float = 1.0,
    decay: float = 0.95,
    codec: Codec = topk(1 / 64, block=4096) | kmeans(4),  # noqa: B008 (a frozen value)
) -> Method:
    """One plain outer step every `every` local steps on the mean of what members sent.

    decay  of what waits, from round to round (beta)
    codec  without a memory: it is given this one
    """
    return Method(schedule=Every(every), payload=Delta(), codec=ErrorFeedback(codec, decay=decay), outer=SGD(outer_lr))
