"""NoLoCo: DiLoCo without all-reduce. Each round a member meets one other, drawn anew, and has an anchor of its own.

    v_i <- alpha v_i - beta mean_G D_j - gamma (a_i - mean_G a_j),  a_i <- a_i + v_i,  theta_i <- a_i
                                    D_j = a_j - theta_j, G = the member and its partner            every H local steps

Both means come of one vector. With x_j = a_j + beta/gamma (theta_j - a_j), the parameters stretched away from the
anchor, v_i <- alpha v_i - gamma (a_i - mean_G x_j): a heavy-ball step towards the partner. That is half of the bytes of
the rule as it is written, and for beta = gamma what is sent is the parameters themselves.

Error   with all members in one group and one anchor it is DiLoCo with heavy ball (lr beta, momentum alpha), but for
        rounding. Anchors differ; their disagreement dies out if gamma < 2 (1 - alpha^2), and grows above: checked here.
Size    4n bytes sent and received per member and round, whatever the number of members; nobody waits for a third.
State   a_i and v_i, of every member's own. The model to use is the mean (Synchronizer.evaluating); `spread()` tells how
        far apart they are.
Source  Kolehmainen et al. 2025, arXiv:2506.10911; alpha=0.5, beta=0.7, H=50. gamma=0.7 is in the authors' code, the
        bound on it for pairs among many members is ours.
Differs one vector is sent, not two. Pairs alone: of an odd number of members one is left out, and steps by itself.
"""

from __future__ import annotations

from thinwire.codecs import Codec, fp32
from thinwire.errors import ConfigError
from thinwire.method import Method
from thinwire.outer import SGD, Towards
from thinwire.payloads import Parameters
from thinwire.schedules import Every
from thinwire.topologies import RandomPairs


def noloco(
    *, every: int = 50, outer_lr: float = 0.7, momentum: float = 0.5, pull: float = 0.7, codec: Codec = fp32
) -> Method:
    """Meet a random partner every `every` local steps (H).

    outer_lr  on the mean of what the two learnt (beta)
    momentum  alpha
    pull      of the partner's anchor (gamma)
    codec     lossless: what is sent is parameters
    """
    largest = 2 * (1 - momentum**2)
    if not 0 < pull < largest:
        raise ConfigError(
            f"noloco with pull={pull} and momentum={momentum}: members' models would move apart, not together",
            expected=f"a pull between 0 and {largest:.3g}, which is 2 (1 - momentum^2)",
            mend=f"pull={min(0.7, round(largest / 2, 2)):g}, or less momentum",
        )
    return Method(
        schedule=Every(every),
        payload=Parameters(stretch=outer_lr / pull),
        codec=codec,
        topology=RandomPairs(),
        outer=Towards(SGD(pull, momentum)),
    )
