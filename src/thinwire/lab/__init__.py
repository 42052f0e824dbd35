"""Hosts and limited links on one machine: real sockets, real congestion, no mock. See docs/lab.md."""

from thinwire.lab.ledger import VARIABLE, Ledger, read_ledger, write_ledger
from thinwire.lab.network import Counters, Lab
from thinwire.lab.result import HostResult, LabResult, table
from thinwire.lab.running import clean, run, torchrun_environment
from thinwire.lab.spec import LabSpec
from thinwire.lab.tools import Abilities, abilities

__all__ = [
    "VARIABLE",
    "Abilities",
    "Counters",
    "HostResult",
    "Lab",
    "LabResult",
    "LabSpec",
    "Ledger",
    "abilities",
    "clean",
    "read_ledger",
    "run",
    "table",
    "torchrun_environment",
    "write_ledger",
]
