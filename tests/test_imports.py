"""Arrows point one way, and importing does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "thinwire"

#: From the bottom up: a room may import from its own floor's rooms by name below, and from floors under it.
FLOORS: list[set[str]] = [
    {"version", "errors"},
    {"packet", "packing", "randomness", "units", "expressions", "sharding", "batch_size"},
    {"aggregators", "links", "pace"},
    {"codecs"},
    {"routes"},
    {"graphs"},
    {"schedules", "payloads", "topologies", "outer", "fragments"},
    {"method", "ways"},
    {"collectives"},
    {"handshake"},
    {"island"},
    {"methods", "rounds", "buffers", "ensembles", "stability"},
    {"elastic"},
    {"snapshot", "inner", "regroup"},
    {"kept"},
    {"synchronizer", "hooks", "pushes", "decentralized", "seeds", "snapshots", "watch"},
    {"integrations"},
]
#: Imports inside functions that point back, and why they may: each breaks a cycle that is in the thing itself.
BACKWARDS = {
    ("codecs.base", "codecs.chain"): "`a | b` is an operator of every codec, and its result is one of them",
}


def modules() -> dict[str, Path]:
    """Dotted name below thinwire ("" is the package itself) -> file."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Modules of thinwire that a module imports, at the top or inside functions; names below thinwire."""
    wanted = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            wanted |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {target for full in wanted if (target := _module_of(full)) is not None}


def _module_of(full: str) -> str | None:
    """The longest prefix that is a module of ours: `thinwire.codecs.fp32` is `codecs`."""
    if full != "thinwire" and not full.startswith("thinwire."):
        return None
    parts = full.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)


GRAPH = {name: imports(name) - {name} for name in MODULES}


def room(name: str) -> str:
    return name.split(".")[0]


def floor_of(name: str) -> int | None:
    return next((level for level, rooms in enumerate(FLOORS) if room(name) in rooms), None)


def test_there_is_a_graph():
    assert "collectives" in GRAPH["rounds"]
    assert "codecs.precision" in GRAPH["method"]
    assert "codecs.chain" in GRAPH["codecs.base"], "imports inside functions are seen"


def test_no_cycle():
    graph = {name: targets - {t for s, t in BACKWARDS if s == name} for name, targets in GRAPH.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' <- '.join(error.args[1])}")


def test_no_exception_is_listed_without_need():
    assert all(target in GRAPH[source] for source, target in BACKWARDS)


@pytest.mark.parametrize("name", [name for name in MODULES if floor_of(name) is not None])
def test_the_core_imports_only_from_below(name):
    """Between rooms of one floor nothing but what is listed here."""
    level = floor_of(name)
    beside = {("outer", "payloads")}
    for target in GRAPH[name]:
        if room(target) == room(name):
            continue
        under = floor_of(target)
        assert under is not None, f"{name} imports {target or 'thinwire itself'}, which is above the core"
        assert under < level or (room(name), room(target)) in beside, f"{name} imports {target}"


def test_links_know_nothing_of_learning():
    allowed = {"errors", "links", "packet", "randomness", "units"}
    for name in MODULES:
        if room(name) == "links":
            assert {room(target) for target in GRAPH[name]} <= allowed, name
            assert "nn" not in _torch_parts(name), f"{name} imports torch.nn"


def test_codecs_and_rules_know_nothing_of_links():
    for name in MODULES:
        if room(name) in ("codecs", "aggregators", "outer", "payloads", "schedules", "routes", "graphs", "topologies"):
            assert not {"links", "collectives", "rounds", "synchronizer"} & {room(target) for target in GRAPH[name]}, (
                name
            )
            assert not {"socket", "threading", "torch.distributed", "time", "os"} & _others(name), name


def test_methods_know_nothing_of_sockets():
    for name in MODULES:
        if room(name) in ("method", "methods"):
            assert not {"links", "collectives", "rounds", "synchronizer"} & {room(target) for target in GRAPH[name]}, (
                name
            )


def _others(name: str) -> set[str]:
    """Modules of others that a module imports, whole and by their first two parts."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _torch_parts(name: str) -> set[str]:
    return {other.split(".")[1] for other in _others(name) if other.startswith("torch.")}


def test_nobody_imports_the_command_line():
    ours = ("cli", "__main__")
    assert not [name for name, targets in GRAPH.items() if room(name) not in ours and "cli" in map(room, targets)]


def test_contributions_on_the_shelf_are_not_known_to_the_core():
    assert not [name for name, targets in GRAPH.items() if room(name) != "contrib" and "contrib" in map(room, targets)]


def test_no_module_is_imported_by_star():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), name


IMPORT = """
import os, random, sys, threading
import torch, numpy
before = dict(os.environ), threading.active_count(), torch.get_num_threads(), torch.get_default_dtype()
state, python = torch.get_rng_state(), random.getstate()
hooks = sys.excepthook, threading.excepthook, list(sys.path)
import thinwire
assert dict(os.environ) == before[0], "the environment was changed"
assert threading.active_count() == before[1], "a thread was started"
assert (torch.get_num_threads(), torch.get_default_dtype()) == before[2:]
assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
assert (sys.excepthook, threading.excepthook, list(sys.path)) == hooks
assert not torch.distributed.is_initialized()
heavy = {"matplotlib", "transformers", "sklearn", "datasets", "peft", "pandas", "click", "accelerate", "lightning"}
heavy &= set(sys.modules)
assert not heavy, f"imported {heavy}"
import logging
assert not logging.getLogger("thinwire").handlers and not logging.getLogger().handlers
print("fine")
"""


def test_importing_has_no_effects_and_stays_light():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, env=_environment())
    assert done.stdout.strip() == "fine", done.stderr


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": str(SOURCE.parent), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
