"""Late merging: a little gossip all along, and one average of all models, or a few, at the end.

    step t < merge:  theta_i <- (theta_i + theta_j) / 2 for some pairs (i, j)        every H local steps
    step t = merge:  theta_i <- (1/N) sum_j theta_j                                  once, or in the last few rounds

Error   with every pair in every round it is gossip, and the mean of all models is what it would be without the merge:
        the merge moves members, not their mean. Without any gossip models drift too far apart for their mean to be
        good for anything.
Size    4n bytes with fp32 sent by a member in share * R of R rounds, and 2 (N-1)/N * 4n in the merge.
State   none before the merge; afterwards the anchor is the common model.
Source  arXiv:2507.06542: a member talks with probability p = 0.2 in a round, H = 100, R = 300, the merge at the end.
Differs a member talks to one other at most in a round, so that the mean of all models is kept; theirs may be chosen by
        several. Batch statistics are averaged like parameters, and not estimated again after the merge.
"""

from __future__ import annotations

from dataclasses import dataclass

from thinwire.codecs import Codec, fp32
from thinwire.errors import ConfigError
from thinwire.method import Method, Phases
from thinwire.methods.gossip import gossip
from thinwire.outer import Average
from thinwire.payloads import Parameters
from thinwire.routes import Topology
from thinwire.schedules import At
from thinwire.topologies import RandomPairs


def late_merge(
    *,
    every: int = 20,
    merge: int = 400,
    rounds: int = 1,
    topology: Topology = RandomPairs(0.2),  # noqa: B008 (frozen)
    codec: Codec = fp32,
) -> Phases:
    """Gossip every `every` local steps, then averages of all models, the last of them after step `merge`.

    merge   the run's last step, as a rule
    rounds  averages of all models, `every` steps apart
    codec   lossless, as in gossip
    """
    steps = tuple(range(merge - (rounds - 1) * every, merge + 1, every))
    if rounds < 1 or steps[0] < 2:
        raise ConfigError(
            f"late_merge of {rounds} rounds, the last at step {merge}, with a round every {every}",
            expected="at least one round, and steps before the first",
            mend=f"merge at step {rounds * every + every}, or in fewer rounds; local_sgd averages from the start",
        )
    last = Method(schedule=At(steps), payload=Parameters(), codec=codec, outer=Average())
    return Phases(gossip(every=every, topology=topology, codec=codec), steps[0] - 1, last)


@dataclass(frozen=True)
class Budget:
    """What late merging can afford.

    share   of the pairs that talk in a round: late_merge(topology=RandomPairs(share), rounds=rounds)
    rounds  averages of all models at the end
    models  that a member sends in all, in the mean
    """

    share: float
    rounds: int
    models: float


def late_budget(models: float, *, steps: int, every: int, members: int, share: float = 0.2) -> Budget:
    """How to spend as many models as a member may send: thin all along, and what is left as late as can be.

    models  that a member may send to another in the whole run; an average of all costs it 2 (N-1)/N of them
    share   of the pairs that talk in a round, if there is enough for it: what keeps models near enough to be merged
            (arXiv:2507.06542 has 0.2)
    raises  ConfigError if it is not enough for the last average
    """
    in_all, price = steps // every, 2 * (members - 1) / members
    if in_all < 2 or members < 2 or models < price:
        raise ConfigError(
            f"a budget of {models:g} models for {in_all} rounds of {members} members",
            expected=f"at least {price:g}, what an average of all costs a member, and two rounds of two members",
            mend="allow more models, or use gossip(), which ends without an average",
        )
    share = min(share, (models - price) / (in_all - 1))
    left, dearer = models - price - share * (in_all - 1), price - share
    rounds = 1 + (min(int(left / dearer), in_all - 2) if dearer > 0 else in_all - 2)
    return Budget(share, rounds, share * (in_all - rounds) + price * rounds)
