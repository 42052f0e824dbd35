import io

from report_samples import member, record
from rich.console import Console

from thinwire.report import comparison_table, run_summary


def shown(renderable, width=100):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def test_comparison_table():
    runs = [record("slow"), record("[b]fast", (4.0, 2.5, 1.5), every_s=1.0, members=(member(sent_bytes=4000),))]
    lines = shown(comparison_table(runs)).splitlines()
    assert lines[-1].split() == ["[b]fast", "1.500", "4.00", "kB", "250×", "less", "2.00", "s", "2.00", "s", "7.50×"]
    assert "1.500" in lines[1]  # the loss that both reached


def test_comparison_table_fits_80_columns():
    runs = [record("a long label that has to be folded", every_s=1200.0), record("b" * 40)]
    assert "…" not in shown(comparison_table(runs), width=80)


def test_run_summary():
    text = shown(run_summary(record("[red]")))
    for words in (
        "[red]",
        "topk(0.015625) | int4",
        "20 Mbit/s up and down, 40 ms (simulated clock)",
        "1.00 MB",
        "3.00 s exposed, 500 ms hidden",
        "00ff",
    ):
        assert words in text
