"""`thinwire ledger`: whether every sample was counted once."""

from __future__ import annotations

from pathlib import Path

import click

from thinwire.cli import DONE
from thinwire.elastic.journal import read
from thinwire.elastic.proof import prove
from thinwire.errors import ThinwireError

_MOST = 20


@click.command()
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))
def ledger(folder: Path) -> int:
    """Prove that each sample was counted once an epoch.

    FOLDER is that of a run of `thinwire up`; copy the logs of other machines
    (members/*.jsonl) into it if a round is said to be in none. Exit code 2 if a unit
    is missing or was done twice.
    """
    proof = prove(read(folder))
    if proof.wrong:
        told = "".join(f"\n    {sentence}" for sentence in proof.wrong[:_MOST])
        more = f"\n    and {len(proof.wrong) - _MOST} more" if len(proof.wrong) > _MOST else ""
        raise ThinwireError(
            f"{len(proof.wrong)} things are wrong in {folder}:{told}{more}",
            expected="every unit of every finished epoch in exactly one committed round",
            mend="copy the logs of all machines here; if that is done, this is a fault of thinwire: report it",
        )
    again = f"; {proof.void} more were lost with a restart and done again" if proof.void else ""
    print(f"{proof.rounds} rounds, each on top of the one before{again}.")
    units = proof.epochs * proof.units_per_epoch
    print(f"{proof.epochs} epochs of {proof.units_per_epoch} units are done: {units} units, each exactly once.")
    for name, count in sorted(proof.by.items(), key=lambda pair: -pair[1]):
        if count:
            print(f"  {count:>9}  {name}")
    print(f"{proof.beyond} units of the epoch under way, each once.")
    return DONE
