"""The byte ledger a program leaves for the lab: a small JSON file, named in the environment variable THINWIRE_LEDGER.

    {"sent_bytes": 120, "received_bytes": 80, "by_purpose": {"round": [100, 80], "hello": [20, 0]}}

Any program may write one, in any language; the lab sets it beside the interface's own counters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from thinwire.errors import ConfigError

if TYPE_CHECKING:
    from thinwire.links.meter import Meter

VARIABLE = "THINWIRE_LEDGER"


@dataclass(frozen=True)
class Ledger:
    """Bytes a program handed to its links.

    by_purpose  name -> (sent, received)
    """

    sent_bytes: int
    received_bytes: int
    by_purpose: Mapping[str, tuple[int, int]]


def write_ledger(path: Path, meter: Meter) -> None:
    """Leave a link's ledger for the lab; written beside the place and renamed, so that no half of one is ever read."""
    total = meter.total()
    purposes = {name: [traffic.sent_bytes, traffic.received_bytes] for name, traffic in meter.by_purpose().items()}
    text = {"sent_bytes": total.sent_bytes, "received_bytes": total.received_bytes, "by_purpose": purposes}
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(text))
    draft.replace(path)


def read_ledger(path: Path) -> Ledger | None:
    """What a program left; None if it left nothing.

    raises  ConfigError if the file is no ledger
    """
    try:
        found = json.loads(path.read_text())
        purposes = {str(name): (int(sent), int(got)) for name, (sent, got) in found["by_purpose"].items()}
        return Ledger(int(found["sent_bytes"]), int(found["received_bytes"]), purposes)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(
            f"lab: the ledger {path} cannot be read: {type(error).__name__}: {error}",
            expected='{"sent_bytes": int, "received_bytes": int, "by_purpose": {name: [sent, received]}}',
            mend=f"have the program write that to the path in {VARIABLE}, or nothing at all",
        ) from error
