import json
from pathlib import Path

import pytest

from thinwire.errors import ConfigError
from thinwire.report.record import RunRecord


def records() -> dict[str, RunRecord]:
    found = sorted(Path("runs/compare").glob("*/record.json"))
    return {path.parent.name: RunRecord.from_json(path.read_text()) for path in found}


def test_methods_on_the_same_work(call, small):
    code, out, _ = call(
        "compare", "--methods", "ddp,diloco,streaming", *small, "--steps", 8, "--every", 4, "--overlap=1"
    )
    assert code == 0
    assert out.splitlines()[-1] == "report  runs/compare/report.html"
    found = records()
    assert list(found) == ["0-ddp", "1-diloco", "2-streaming"]
    assert found["0-ddp"].method["schedule"] == "Every(steps=1, overlap=0)"  # it cannot be told either
    assert found["1-diloco"].method["schedule"] == "Every(steps=4, overlap=0)"
    assert found["2-streaming"].method["schedule"] == "Every(steps=4, overlap=1)"
    assert {record.steps for record in found.values()} == {8}
    page = Path("runs/compare/report.html").read_text()
    assert all(name in page for name in ("ddp", "diloco", "streaming"))


def test_again_starts_anew(call, small):
    words = ["compare", "--methods", "ddp,diloco", *small, "--steps", 4, "--every", 2]
    call(*words)
    before = records()
    assert call(*words)[0] == 0
    assert [record.digest for record in records().values()] == [record.digest for record in before.values()]


def test_files(call, small):
    Path("one.toml").write_text("steps = 4\n[method]\nname = 'ddp'\n")
    Path("two.toml").write_text("steps = 4\n[method]\nname = 'diloco'\nevery = 2\n")
    code, out, _ = call("compare", "one.toml", "two.toml", *small, "--json")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["label"] for line in lines if line["event"] == "compared"] == ["one", "two"]


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("", "one run to compare"),
        ("--methods ddp", "one run to compare"),
        ("--methods ddp,dilocoo", "--methods ddp,dilocoo: there is no method 'dilocoo'"),
        ("--methods ddp,diloco --stps 3", "--stps 3: no such option"),
        ("--methods ddp,diloco --fragments 3", "--fragments 3: no such option"),
        ("a.toml b.toml", "a.toml: No such file or directory"),
    ],
)
def test_what_cannot_be_compared(call, words, wrong):
    with pytest.raises(ConfigError) as caught:
        call("compare", *words.split())
    assert caught.value.wrong == wrong


@pytest.mark.slow
def test_the_demo(call):
    code, out, _ = call("demo", "--steps", 20, "--workers", 2, "--rate", "5mbit")
    assert code == 0
    assert "One GPT of 0.2M parameters on 2 members, 5mbit up and down" in out
    assert [line.split("  ")[0] for line in out.splitlines() if "20/20" in line] == [
        "every step",
        "diloco",
        "streaming",
    ]
    assert Path("runs/demo/report.html").exists()
    assert call("demo", "--steps", 20, "--workers", 2)[0] == 0  # again, in the same folder


@pytest.mark.parametrize(("flag", "wrong"), [("--rate", "'fast' is no rate"), ("--delay", "'fast' is no duration")])
def test_the_demos_line(call, flag, wrong):
    with pytest.raises(ConfigError) as caught:
        call("demo", flag, "fast")
    assert caught.value.wrong == f"{flag} fast: {wrong}"
