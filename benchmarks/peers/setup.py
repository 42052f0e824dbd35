"""Make the virtual environments that peers need: benchmarks/cache/torchft, hivemind and exogym.

    python benchmarks/peers/setup.py [NAME ...]

Versions are pinned in requirements-NAME.txt. torch is pinned first, so that no peer's range brings another build of it.
Accelerate needs no environment of its own: it is among thinwire's test dependencies. exogym's package on PyPI is empty,
so that one comes from its repository, or from a copy of it in benchmarks/cache/exogym-source, and without its
dependencies: of those only what its strategies import is in the requirements.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / "cache"
EXOGYM = "git+https://github.com/exo-explore/gym@9fa323c26364f4437ffd23517da5d65946003963"
NAMES = ("torchft", "hivemind", "exogym")


def make(name: str) -> None:
    """One environment; what is there already is kept."""
    place, wanted = CACHE / name, HERE / f"requirements-{name}.txt"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    install = [str(place / "bin" / "python"), "-m", "pip", "install", "-q"]
    subprocess.run([*install, "-r", str(wanted)], check=True)
    if name == "exogym":
        copy = CACHE / "exogym-source"
        subprocess.run([*install, "--no-deps", str(copy) if copy.exists() else EXOGYM], check=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        make(name)
        print(f"{CACHE / name}: ready")
