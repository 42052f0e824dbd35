"""Every-step data parallel training: the baseline that everything else is measured against.

    g <- mean_i g_i    before every optimizer step

Error   with the fp32 codec none but the order of summation: N members on one batch each equal one member on the
        concatenated batch.
Size    2 (N-1)/N * 4n bytes sent per member and step with fp32.
Source  synchronous SGD; Dean et al. 2012, Chen et al. 2016, arXiv:1604.00981.
"""

from __future__ import annotations

from thinwire.codecs import How, fp32
from thinwire.method import Method
from thinwire.outer import NoStep
from thinwire.payloads import Gradient
from thinwire.schedules import Every


def every_step(*, codec: How = fp32) -> Method:
    """Combine gradients before every step."""
    return Method(schedule=Every(1), payload=Gradient(), codec=codec, outer=NoStep())
