"""MuLoCo: DiLoCo around Muon, whose steps add up to changes that survive a few bits.

    D_i = a - theta_i,  D = mean_i C(D_i),  b <- mu b + D,  a <- a - eta (D + mu b),  theta_i <- a    every H steps
    with C = feedback(layers(kmeans(4)), decay=0.9):    e <- 0.9 e + D_i,  q = C(e),  e <- e - q,  D = mean_i q

The inner optimizer is not the method's: `thinwire train --method muloco --optimizer Muon`, or in a loop of one's own
`synchronize(model, thinwire.train.layerwise.muon(model, lr=...), muloco(), link)`: Muon for hidden matrices, AdamW for
embeddings, head, norms and biases.

Error   with diloco's options it is DiLoCo to the bit. With a decay below 1 the memory forgets, so what is sent does not
        add up to all that was done.
Size    2 (N-1)/N * c(n) bytes sent per member and round, c(n) what the codec writes for n elements: 4n for fp32, n/4
        and 16 bytes a matrix for layers(kmeans(4)), beside what is small.
State   anchor a and momentum b, alike on all members; optimizers' moments stay local and are kept: one vector for
        Muon's matrices instead of AdamW's two; of a compressed payload the residual e.
Source  Thérien et al. 2025, arXiv:2505.23725, and the authors' code: outer lr 0.8, momentum 0.9, H=30; for one member
        0.7 and 0.6; inner Muon lr 0.02, momentum 0.95, decay 0.01, clipping at 1; memory 0.9, two bits.
Differs two bits are four means fitted to a matrix (kmeans), where theirs are the means of four fixed intervals of 1.5
        standard deviations, one of them below -2.25 of them: on deltas of a small GPT after 30 Muon steps they leave
        13 and 18 % of the energy (min to max in equal steps: 89). A matrix of fewer than 1024 entries is sent as it is.
        Their code multiplies by the outer lr twice when it compresses (0.64 for 0.8); here once. torch's Muon uses one
        set of coefficients, theirs five: singular values of a step lie in 0.68 to 1.14, not 0.97 to 1.04; and a fused
        query-key-value matrix is one matrix to it.
"""

from __future__ import annotations

from thinwire.codecs import How, fp32
from thinwire.method import Method
from thinwire.outer import Nesterov
from thinwire.payloads import Delta
from thinwire.schedules import Every


def muloco(*, every: int = 30, outer_lr: float = 0.8, momentum: float = 0.9, codec: How = fp32) -> Method:
    """One outer step every `every` local steps of Muon (H in the paper).

    codec  feedback(layers(kmeans(4)), decay=0.9) for two bits an entry
    """
    return Method(schedule=Every(every), payload=Delta(), codec=codec, outer=Nesterov(outer_lr, momentum))
