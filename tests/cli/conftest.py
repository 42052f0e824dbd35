"""The commands as a person calls them, in a folder of their own."""

import pytest

from thinwire.cli import cli

#: The least work that is a run.
SMALL = ["--task.size", "0.2M", "--context", "16", "--batch-size", "2"]
SMALL += ["--validation-windows", "4", "--eval-every", "4"]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call("train", "--steps", 4) -> exit code, standard output, standard error; errors are raised."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("RANK", raising=False)

    def run(*words: object) -> tuple[object, str, str]:
        code = cli.main([str(word) for word in words], prog_name="thinwire", standalone_mode=False)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture
def small():
    return [*SMALL, "--link", "simulated"]
