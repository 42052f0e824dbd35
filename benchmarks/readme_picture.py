"""The README's picture, drawn from the records that `thinwire demo` leaves.

python benchmarks/readme_picture.py runs/demo
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from thinwire.report.record import RunRecord

COLOURS = ("#4c566a", "#d08700", "#0b7285")


def main() -> None:
    folder = Path(sys.argv[1])
    labels = {"every-step": "every step", "diloco": "DiLoCo, every 20", "streaming": "Streaming DiLoCo, 4 bits"}
    figure = Figure(figsize=(9, 3.4), dpi=160, layout="constrained")
    by_time, by_bytes = figure.subplots(1, 2, sharey=True)
    for colour, (name, label) in zip(COLOURS, labels.items(), strict=True):
        record = RunRecord.from_json((folder / name / "record.json").read_text())
        points = [point for point in record.curve if point.valid_loss is not None and point.step > 0]
        loss = [point.valid_loss for point in points]
        by_time.plot([point.seconds for point in points], loss, color=colour, label=label, linewidth=2)
        by_bytes.plot([point.sent_bytes / 1e6 for point in points], loss, color=colour, linewidth=2)
    by_time.set(
        xscale="log", xlabel="seconds on a 20 Mbit/s link (simulated clock)", ylabel="validation loss (nats/byte)"
    )
    by_bytes.set(xscale="log", xlabel="MB sent by each member")
    for axes in (by_time, by_bytes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    by_time.legend(frameon=False)
    figure.savefig(Path(__file__).parents[1] / "docs" / "demo.png")


if __name__ == "__main__":
    main()
