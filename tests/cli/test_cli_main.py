"""The whole program: exit codes, and errors without a traceback."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from thinwire.cli import cli
from thinwire.errors import ConfigError
from thinwire.version import __version__

SRC = Path(__file__).parents[2] / "src"


def program(*words: str, cwd: Path) -> tuple[int, str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": str(SRC)}
    command = [sys.executable, "-m", "thinwire", *words]
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=90, check=False)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.slow
def test_an_error_is_three_parts_and_code_2(tmp_path):
    words = ["train", "--codec", "topk(1.5) | int4"]
    assert program(*words, cwd=tmp_path) == (
        2,
        "",
        "thinwire: --codec 'topk(1.5) | int4': topk is to keep a share of 1.5\n"
        "  expected  a number in (0, 1]: the share of entries sent\n"
        "  mend      for 1.5 % write topk(0.015); `thinwire codecs topk` shows its options\n",
    )


@pytest.mark.slow
def test_what_click_finds_has_three_parts_too(tmp_path):
    code, out, err = program("demo", "--steps", "x", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("thinwire: Invalid value for '--steps': 'x' is not a valid integer")
    assert err.endswith(
        "\n  expected  what `thinwire demo --help` lists\n  mend      look there for names and defaults\n"
    )


@pytest.mark.slow
def test_divergence_ends_without_a_traceback(tmp_path):
    words = "train --task.size 0.2M --context 8 --batch-size 2 --steps 9 --every 3 --lr 1e20 --link simulated"
    code, _, err = program(*words.split(), cwd=tmp_path)
    assert code == 2
    assert err.startswith("thinwire: round 0, fragment 0 at step 3: no member had finite values to contribute\n")
    assert err.count("\n") == 3


def test_a_misspelt_command():
    with pytest.raises(ConfigError) as caught:
        cli.main(["trian"], standalone_mode=False)
    assert str(caught.value) == (
        "there is no command 'trian'\n"
        "  expected  one of: chaos, checkpoint, codecs, compare, demo, doctor, export, import, join, lab, ledger, "
        "methods, replay, status, train, up\n"
        "  mend      did you mean 'train'?"
    )


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["demo"],
        ["train"],
        ["up"],
        ["join"],
        ["status"],
        ["ledger"],
        ["chaos"],
        ["compare"],
        ["methods"],
        ["codecs"],
        ["lab"],
        ["lab", "run"],
        ["lab", "clean"],
        ["doctor"],
    ],
    ids=" ".join,
)
def test_help_everywhere(call, words):
    code, out, _ = call(*words, "--help")
    assert code == 0
    assert out.startswith(f"Usage: {' '.join(['thinwire', *words])} ")
    assert not re.search(r"[a-z]\.\.\.$", out, re.MULTILINE)  # no summary is cut off
    assert max(map(len, out.splitlines())) <= 80


def test_the_version(call):
    assert call("--version")[1] == f"thinwire, version {__version__}\n"
