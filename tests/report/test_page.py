import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import matplotlib
import pytest
from report_samples import member, record

from thinwire.errors import ConfigError
from thinwire.report import Event, Point, write_report
from thinwire.report.page import page

VOID = {"meta"}


class Reader(HTMLParser):
    """Keeps what a test asks for, and sees that every element is closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.headings, self.texts = [], [], [], [], []
        self.tags, self.svgs = set(), 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self._note(tag, dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        self.texts.append(data)

    def _note(self, tag, attrs):
        self.tags.add(tag)
        self.svgs += tag == "svg"
        self.ids += [attrs["id"]] if "id" in attrs else []
        names = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.references += [attrs[name] for name in names if name in attrs]
        self.references += [found for value in attrs.values() for found in re.findall(r"url\(([^)]*)\)", value or "")]


EVENT = Event(100, 20.0, "skipped round", "round 1: member 1 did not answer")
ONE = [record(events=(EVENT,))]
TWO = [record("slow"), record("fast", (4.0, 2.5, 1.5), every_s=1.0, events=(EVENT,))]


def test_one_run_has_every_section():
    assert Reader(page(ONE, title="t")).headings == [
        "In short",
        "What was run",
        "Loss against time",
        "Loss against bytes sent",
        "Accuracy against time",
        "Where the time went",
        "Bytes by purpose",
        "Members",
        "Events",
        "Configuration",
        "Versions and machine",
        "Digest of the final weights",
    ]


def test_a_comparison_begins_with_its_table():
    read = Reader(page(TWO, title="t"))
    assert read.headings[:2] == ["Comparison", "What was run"]
    assert any("was reached by every run; first by fast, after 2.00 s, 7.50× as fast as slow" in t for t in read.texts)


@pytest.mark.parametrize("records", [ONE, TWO])
def test_nothing_is_fetched_and_no_id_is_used_twice(records):
    text = page(records, title="t")
    read = Reader(text)
    assert read.tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form"})
    assert read.svgs == 4
    assert len(read.ids) == len(set(read.ids)) > 0
    assert read.references
    assert {reference[0] for reference in read.references} == {"#"}
    assert {reference[1:] for reference in read.references} <= set(read.ids)
    assert "@import" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_every_colour_of_the_plots_is_the_pages():
    text = page(TWO, title="t")
    assert "#0a0" not in text
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", text))
    assert used <= set(re.findall(r"(--[a-z0-9-]+):", text))


def test_everybodys_words_are_escaped():
    evil = "<script>alert('&\"')</script>"
    run = replace(
        record(evil, config=evil, events=(Event(1, 1.0, evil, evil),)),
        method={"codec": evil},
        versions={evil: evil},
        machine=evil,
        network=evil,
        bytes_by_purpose={evil: (1, 1)},
        final={evil: 1.0},
        digest=evil,
    )
    for records in ([run], [run, record()]):
        text = page(records, title=evil)
        assert "<script" not in text
        assert "script" not in Reader(text).tags
        assert sum(evil in part for part in Reader(text).texts) >= 11


def test_mathematics_in_a_label_is_left_alone():
    assert "$x^2$ \\frac" in "".join(Reader(page([record("$x^2$ \\frac"), record()], title="t")).texts)


def test_equal_records_give_equal_files(tmp_path):
    for name in ("a.html", "deep/b.html"):
        write_report(tmp_path / name, TWO, title="t")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "deep/b.html").read_bytes()


def test_the_callers_plot_settings_change_nothing_and_are_left_alone():
    before = page(ONE, title="t")
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "axes.grid": False}):
        assert page(ONE, title="t") == before
        assert matplotlib.rcParams["lines.linewidth"] == 9


LAST = ONE[0].curve[-1]
ODD = {
    "a single point": replace(record(), curve=(Point(0, 0.0, 0, 2.0, 2.0),)),
    "no points": replace(record(), curve=()),
    "no validation": record(losses=(None, None, None)),
    "zero bytes": replace(
        record(members=(member(sent_bytes=0),)),
        curve=tuple(replace(point, sent_bytes=0) for point in record().curve),
        bytes_by_purpose={"hello": (0, 0)},
    ),
    "nan at the end": record(losses=(4.0, 2.0, math.nan)),
    "nan throughout": replace(record(), curve=(replace(LAST, train_loss=math.nan, valid_loss=math.nan),)),
    "infinite loss": record(losses=(4.0, math.inf, 1.0)),
    "loss that explodes": record(losses=(4.0, 1.0, 1e30)),
    "no members": record(members=()),
    "nan durations": record(members=(member(wait_s=math.nan),)),
    "no durations": record(
        members=(replace(member(wait_s=0.0, hidden_s=0.0), compute_s=0.0, encode_s=0.0, apply_s=0.0),)
    ),
    "many members": record(members=tuple(member(rank) for rank in range(40))),
    "nothing told": replace(record(config=""), method={}, versions={}, machine="", network="", digest="", final={}),
    "a lone surrogate": record("\ud800"),
    "another script": record("比較 مقارنة"),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("error")
def test_odd_records_have_a_report(name, tmp_path):
    write_report(tmp_path / "one.html", [ODD[name]], title=name)
    write_report(tmp_path / "two.html", [ODD[name], record()], title=name)
    write_report(tmp_path / "three.html", [record(), ODD[name], ODD[name]], title=name)
    for path in tmp_path.iterdir():
        Reader(path.read_text())


def test_runs_whose_bytes_differ_widely_share_a_logarithmic_axis():
    def axis(factor):
        points = tuple(replace(point, sent_bytes=point.sent_bytes * factor) for point in record().curve)
        text = page([record("a"), replace(record("b"), curve=points)], title="t")
        svg = text[text.index('aria-label="validation loss against sent by') :]
        return [
            float(x.replace(",", ""))
            for x in re.findall(r"text-anchor: middle[^>]*>([0-9.,]+)<", svg[: svg.index("</svg>")])
        ]

    near, far = axis(2), axis(1000)
    assert len({round(b - a, 6) for a, b in pairwise(near)}) == 1
    assert len({round(b / a, 6) for a, b in pairwise(far)}) == 1


def test_exposed_and_hidden_seconds_are_told_apart():
    """Member 0 waited 2 s and member 1 4 s, beside 1 s of coding each; 30 s and 10 s ran beside the compute."""
    one = record("one", members=(member(0, hidden_s=30.0), member(1, wait_s=4.0, hidden_s=10.0)))
    words = " ".join(" ".join(Reader(page([one], title="t")).texts).split())
    assert "Exposed communication 4.00 s 38.1 % of the members' time, which stood still" in words
    assert "Hidden communication 20.0 s beside the compute" in words
    assert "Exposed: a member stood still for a round, for the link (wait) or for its own coding (encode)." in words
    two = page([record("other", members=(member(wait_s=7.0, hidden_s=0.5),)), one], title="t")
    table = two[two.index("Comparison") : two.index("What was run")].replace("\n", "")
    rows = re.findall(r"<tr>.*?</tr>", table)
    cells = [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]
    at = cells[0].index("Exposed")
    assert [row[at : at + 2] for row in cells] == [["Exposed", "Hidden"], ["8.00 s", "500 ms"], ["4.00 s", "20.0 s"]]


def test_what_should_be_equal_and_is_not_is_said():
    text = page([record(), replace(record(), network="1 Gbit/s", seed=8)], title="t")
    assert "These runs also differ in: network, seed. Compare with care." in text
    assert "Compare with care" not in page(TWO, title="t")


def test_of_many_events_the_first_are_shown_and_all_are_counted():
    events = tuple(Event(i, float(i), "late", f"event number {i}.") for i in range(300))
    text = page([record(events=events)], title="t")
    assert "300 × late; the first 200 are shown" in text
    assert "event number 199." in text
    assert "event number 200." not in text


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="of no runs"):
        write_report(tmp_path / "x.html", [], title="t")
