"""Every Python snippet of the README and of docs/ runs, in order, file by file, in an empty folder."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from thinwire.lab import abilities

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> str:
    return "\n".join(SNIPPET.findall(page.read_text()))


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_the_snippets_of_a_page_run(page, tmp_path):
    if "thinwire.lab" in snippets(page) and abilities().obstacle:
        pytest.skip("the lab's page needs root and iproute2")
    if "join_elastic" in snippets(page) and find_spec("torchft") is None:
        pytest.skip("the elastic link's page needs torchft, which is not there for this Python or machine")
    script = tmp_path / "snippets.py"
    script.write_text(snippets(page))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_commands_named_in_the_readme_exist():
    from thinwire.cli import cli

    known = set(cli.list_commands(None))
    named = set(re.findall(r"^(?:\.venv/bin/)?thinwire (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named <= known
    assert "demo" in (ROOT / "README.md").read_text()


WITH_EXAMPLES = sorted(path for path in (ROOT / "src").rglob("*.py") if ">>> " in path.read_text())


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_in_docstrings_run(path):
    name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    result = doctest.testmod(import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
