"""hivemind's Optimizer: local updates with models averaged once an epoch in the background, or large global batches.

options  local: whether peers step on their own gradients (use_local_updates); every: steps of a member in an epoch, so
         that target_batch_size is every * members * batch; delay: for global batches, whether averaging and the step
         run beside the next epoch (delay_grad_averaging, delay_optimizer_step)

Peers hold no common model with local updates, only nearly equal ones: member 0 hands over its own. Float16
compression everywhere and matchmaking of 3 seconds are what its own guide recommends for small runs.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import hivemind
import torch
from hivemind.compression import Float16Compression
from member import Member, flat

_MATCHMAKING_S = 3.0


def address(rank: int) -> str:
    """Of a host in the lab: host 0's, with another last number."""
    return f"{os.environ['MASTER_ADDR'].rpartition('.')[0]}.{rank + 1}"


def join(work: Member) -> hivemind.DHT:
    """The DHT: host 0 first, the others through it. Where it listens is told in the shared folder."""
    told, here = work.folder / "peer", f"/ip4/{address(work.rank)}/tcp/29530"
    if work.rank == 0:
        dht = hivemind.DHT(host_maddrs=[here], start=True)
        draft = work.folder / "peer-draft"
        draft.write_text("\n".join(map(str, dht.get_visible_maddrs())))
        draft.rename(told)
        return dht
    while not told.exists():
        time.sleep(0.05)
    return hivemind.DHT(host_maddrs=[here], initial_peers=told.read_text().split(), start=True)


def main() -> None:
    work = Member(Path(sys.argv[1]))
    options: dict[str, Any] = work.options
    dht, model = join(work), work.model()
    batch = work.work["batch_size"]
    if options["local"]:
        how = {"use_local_updates": True, "delay_state_averaging": True}
    else:
        how = {"delay_grad_averaging": options["delay"], "delay_optimizer_step": options["delay"]}
    optimizer = hivemind.Optimizer(
        dht=dht, run_id="peers", batch_size_per_step=batch, target_batch_size=options["every"] * work.world * batch,
        params=model.parameters(), optimizer=work.optimizer, matchmaking_time=_MATCHMAKING_S, averaging_timeout=60.0,
        grad_compression=Float16Compression(), state_averaging_compression=Float16Compression(), verbose=True,
        tracker_opts={"min_refresh_period": 0.1, "default_refresh_period": 0.5}, **how,
    )  # fmt: skip
    torch.set_num_threads(1)
    work.begin(lambda: flat(model))
    for _ in work.steps():
        optimizer.zero_grad()
        work.loss(model).backward()
        work.clip(model)
        optimizer.step()
        work.stepped()


if __name__ == "__main__":
    main()
