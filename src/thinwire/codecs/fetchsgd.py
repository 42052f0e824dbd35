"""FetchSGD: members send sketches, and momentum and error memory live in sketches too, alike on all members.

    S   = mean_w sketch(x_w)
    U  <- momentum U + S
    E  <- E + U
    update = k largest estimates of E; their cells in E (and, with masking, in U) become zero

No member remembers anything of its own, so members may come and go from round to round.

Error   no bound for all x; what is not sent stays in E until it is large enough to be found (see sketch).
Size    4 R W bytes a member and round, whatever n, as an all-reduce.
State   shared: the sketches U and E.
Cost    a sketch of x, estimates of all n elements, and their k largest.
Source  Rothchild et al. 2020, arXiv:2007.07682, Alg. 1.
Differs cells of what was sent are set to zero, as the authors' code does; Alg. 1 subtracts the sketch of the update,
        which diverged in their practice. The learning rate is the optimizer's: the update is in the units of x, so a
        changed rate rescales what waits in E. Hashes are the same in all rounds, as sums over rounds must be.
Avoid   with a fixed group and memory to spare: feedback(topk) sends less for the same error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.codecs.options import call, changed, check_flag, check_share, is_number
from thinwire.codecs.sketch import check_indices, check_table, sketched, touched, unsketch
from thinwire.codecs.stages import Result, Stage, Staged, Stages, Tensors
from thinwire.errors import ConfigError
from thinwire.randomness import mix

_HASHES = mix(0x46657463)


@dataclass(frozen=True)
class FetchSGD(Staged):
    """Heavy hitters of sketched, accumulated updates.

    share     of the elements that each update holds, in (0, 1]; k = ceil(share * n)
    width     cells of a row, W above
    rows      hashed independently, an odd number; R above
    momentum  in [0, 1); the optimizer that takes the update should have none of its own
    masking   whether an element that was sent starts again without momentum
    """

    share: float
    width: int
    rows: int = 5
    momentum: float = 0.9
    masking: bool = True

    def __post_init__(self) -> None:
        mend = "write fetchsgd(0.01, width=...), with ten cells a row or more for each element sent"
        check_share("fetchsgd", self.share, of="elements in each update", mend=mend, verb="send")
        check_table("fetchsgd", self.width, self.rows)
        if not (is_number(self.momentum) and 0 <= self.momentum < 1):
            raise ConfigError(
                f"fetchsgd with a momentum of {self.momentum!r}",
                expected="a number from 0 (none) to below 1",
                mend="leave it out for 0.9",
            )
        check_flag("fetchsgd", "with masking", self.masking)

    @property
    def spec(self) -> str:
        return call("fetchsgd", share=float(self.share), width=self.width, **changed(self))

    @property
    def wants_feedback(self) -> bool:
        return False

    @property
    def contractive(self) -> bool:
        return False  # has its own memory; what one member's vector comes to cannot be told apart

    def run(self, x: Tensor, shared: Tensors, key: int) -> Stages:
        check_indices("fetchsgd", len(x))
        combined, _ = yield Stage(sketched(x, self.width, self.rows, _HASHES).view(-1))
        zero = torch.zeros_like(combined)
        momentum = shared.get("momentum", zero).mul(self.momentum).add_(combined)
        error = shared.get("error", zero) + momentum
        table = error.view(self.rows, self.width)
        index, value = unsketch(table, len(x), math.ceil(self.share * len(x)), _HASHES)
        update = torch.zeros_like(x).index_copy_(0, index, value)
        for j, cells in enumerate(touched(index, self.width, self.rows, _HASHES)):
            table[j][cells] = 0.0
            if self.masking:
                momentum.view(self.rows, self.width)[j][cells] = 0.0
        return Result(update, x, {"momentum": momentum, "error": error})


fetchsgd = FetchSGD
