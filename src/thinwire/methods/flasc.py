"""FLASC: train all of an adapter, send the largest part of its change, step with Adam.

    D_i = a - theta_i,  D = mean_i C(D_i),  a <- Adam(a, D),  theta_i <- a    every H local steps

C keeps the k entries of largest magnitude among all of the adapter's together, so that layers compete for them, and
what it drops is not remembered: a client may never be asked again.

Error   C = topk(1) is DiLoCo with Adam outside. Dropping without memory is biased: an entry whose change is always
        small is never moved.
Size    (N-1) c(n) bytes sent per member and round, c(n) what the codec writes for n elements: 9 bits an element for
        topk(1/4), 3 for topk(1/4) | int8, 1 for topk(1/16) | int8, against 32.
State   anchor a and Adam's moments, alike on all members; inner optimizers' moments stay local and are kept.
Source  Kuo, Raje, Rajesh & Smith 2024, arXiv:2406.05233 (FLASC). From notes on its published code: AdamW with lr=0.005
        outside, SGD with lr=0.0005 and momentum 0.9 for one epoch inside, densities 1/4 and 1/16.
Differs there is no server: each member holds the anchor and takes the outer step itself, so nothing is downloaded, and
        the paper's second mask, on the model that a client is sent, has no bytes to save. No weight decay outside. All
        trainable parameters count as the adapter's; the paper leaves heads dense.
"""

from __future__ import annotations

from thinwire.codecs import Codec, ErrorFeedback, topk
from thinwire.method import Method
from thinwire.outer import Adam
from thinwire.payloads import Delta
from thinwire.schedules import Every


def flasc(
    *,
    every: int = 20,
    outer_lr: float = 0.005,
    codec: Codec | ErrorFeedback = topk(1 / 4),  # noqa: B008 (a frozen value)
) -> Method:
    """One outer Adam step every `every` local steps on the mean of sparse changes.

    codec  without a memory unless it is given one: feedback(topk(1/4))
    """
    if isinstance(codec, Codec) and codec.traits.wants_feedback:
        codec = ErrorFeedback(codec, decay=0)
    return Method(
        schedule=Every(every),
        payload=Delta(),
        codec=codec,
        outer=Adam(outer_lr, betas=(0.9, 0.999), eps=1e-8),
    )
