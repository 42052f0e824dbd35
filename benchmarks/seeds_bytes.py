"""What a byte a gradient costs on the wire: bytes at the hosts' interfaces, by scalars a round.

    sudo python benchmarks/seeds_bytes.py [--samples 1,16,128,1024] [--rate 256kbit] [--out FILE.md]

Four hosts in the lab tune a GPT of 0.2M parameters by `thinwire train --method just_one_byte`. Two runs of unlike
length for every row: what a round costs is their difference, so that the hand-shake and the end are not in it. A
member tells three others, so the payload is three bytes a scalar and round; the packet's frame, the roll call (every
two seconds or 50 rounds) and the headers of TCP, IP and Ethernet, acknowledgements included, come on top.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import thinwire
from thinwire.lab import LabSpec
from thinwire.lab import run as run_in_lab
from thinwire.report.record import RunRecord
from thinwire.units import Rate

HOSTS, FEWEST, SCALARS = 4, 4, 4096
WORK = ["--task.size", "0.2M", "--context", "8", "--batch-size", "1", "--lr", "1e-4", "--warmup-steps", "0"]


@dataclass(frozen=True)
class Run:
    """Means over hosts, of everything a run sent.

    interface  bytes at the interface
    scalars    bytes of packets with scalars
    others     bytes of all other packets: the roll call
    """

    interface: float
    scalars: float
    others: float


def measured(samples: int, steps: int, rate: float | None) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "run", Path(folder) / "logs"
        command = [
            "sh", "-c", 'exec "$0" "$@" > /dev/null', sys.executable, "-m", "thinwire", "train", *WORK,
            "--method", "just_one_byte", "--samples", str(samples), "--steps", str(steps), "--eval-every", "0",
            "--checkpoint-every", "0", "--out", str(out),
        ]  # fmt: skip
        result = run_in_lab(LabSpec(hosts=HOSTS, rate_bits_per_s=rate), command, logs=log)
        if result.exit_code:
            said = "\n".join(path.read_text(errors="replace")[-800:] for path in sorted(log.glob("*.log")))
            raise SystemExit(f"{' '.join(command)} ended with {result.exit_code}\n{said}")
        record = RunRecord.from_json((out / "record.json").read_text())
    sent = statistics.mean(host.counters.sent_bytes for host in result.hosts)
    scalars = record.bytes_by_purpose["scalars"][0] / HOSTS
    return Run(sent, scalars, record.sent_bytes - scalars)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", default="1,16,128,1024")
    parser.add_argument("--rate", default="256kbit")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rate = Rate.parse(args.rate).bits_per_s
    lines = [
        "Written by `python benchmarks/seeds_bytes.py`, which says what is run.",
        f"{HOSTS} hosts at {args.rate}; two runs of unlike length a row. thinwire {thinwire.__version__}, torch "
        f"{torch.__version__}, Python {platform.python_version()}, Linux {platform.release()}. A gradient of every "
        "parameter in float32 would be 2.6 MB a round to three others.",
        "",
        "| scalars a member and round | payload to three others | packets with them | other packets | at the interface "
        "| interface over payload | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for samples in map(int, args.samples.split(",")):
        rounds, payload = min(100, max(2 * FEWEST, SCALARS // samples)), (HOSTS - 1) * samples
        short, long = measured(samples, FEWEST, rate), measured(samples, FEWEST + rounds, rate)
        packets, others = (long.scalars - short.scalars) / rounds, (long.others - short.others) / rounds
        interface = (long.interface - short.interface) / rounds
        lines.append(
            f"| {samples} | {payload} B | {packets:.0f} B | {others:.0f} B | {interface:.0f} B "
            f"| {interface / payload:.2f} | {rounds} |"
        )
        print(lines[-1], flush=True)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
