"""Make the virtual environments that peers need: benchmarks/cache/torchft and benchmarks/cache/hivemind.

    python benchmarks/peers/setup.py [NAME ...]

Versions are pinned in requirements-NAME.txt. torch is pinned first, so that no peer's range brings another build of it.
Accelerate needs no environment of its own: it is among thinwire's test dependencies. exogym's package on PyPI is empty;
simulate_exogym.py says what to do.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / "cache"
NAMES = ("torchft", "hivemind", "exogym")


def make(name: str) -> None:
    """One environment; what is there already is kept."""
    place, wanted = CACHE / name, HERE / f"requirements-{name}.txt"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    subprocess.run([str(place / "bin" / "python"), "-m", "pip", "install", "-q", "-r", str(wanted)], check=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        make(name)
        print(f"{CACHE / name}: ready")
