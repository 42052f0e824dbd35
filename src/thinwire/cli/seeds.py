"""`thinwire export`, `thinwire import` and `thinwire replay`: a fine-tune as a base, seeds and scalars."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from thinwire.cli import DONE
from thinwire.errors import ConfigError, StateMismatch
from thinwire.seeds.digests import ascending, digest
from thinwire.seeds.log import Log
from thinwire.seeds.rebuild import Check, Stored, audit, rebuild_file
from thinwire.seeds.seal import is_signed, key_of
from thinwire.seeds.sums import Sums

_PATH = click.Path(path_type=Path)
_KEY = click.option("--key", type=_PATH, help="File of 16 bytes or more that only the team has.")


@click.command(short_help="Write a fine-tune as seeds and scalars.")
@click.argument("run", type=_PATH, metavar="RUN_FOLDER")
@click.argument("file", type=_PATH)
@click.option("--seeds", is_flag=True, help="Base, seeds and scalars: kilobytes.")
@_KEY
def export(run: Path, file: Path, seeds: bool, key: Path | None) -> int:
    """Write a fine-tune as base digest, seeds and scalars.

    \b
    thinwire export --seeds runs/tuned tuned.log
    thinwire export --seeds runs/tuned tuned.log --key team.key

    The run's log is checked against the run's own model before it is written; with a key it is signed.
    """
    if not seeds:
        raise ConfigError(
            f"export {run} {file}: as what?",
            expected="--seeds: base digest, seeds and scalars",
            mend=f"add --seeds; the weights themselves are in {run / 'model.safetensors'} already",
        )
    if not (run / "seeds.log").exists():
        raise ConfigError(
            f"{run} has no seeds.log",
            expected="the folder of a run that was tuned by seeds and scalars",
            mend="thinwire train --method just_one_byte writes it; other runs are their model.safetensors",
        )
    log = _read(run / "seeds.log", None)
    with Stored(run / "model.safetensors", log.aliases) as tensors:
        _check_names(log, tensors, run)
        found = digest(ascending(tensors, log.tensors))
    if log.result not in (None, found):
        raise StateMismatch(
            f"{run}: model.safetensors has the digest {found}",
            expected=f"digest {log.result}, which seeds.log has after its last round",
            mend="export a run's folder as it was left: one of the two files is of another run, or was changed",
        )
    data = log.checked(found).to_bytes(_key(key))
    with _told(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    click.echo(f"{file}  {len(data)} bytes, {_extent(log)}, {'signed, ' if key else ''}result {found}")
    return DONE


@click.command("import", short_help="Rebuild the weights of a fine-tune, bit for bit.")
@click.argument("file", type=_PATH)
@click.option("--base", type=_PATH, required=True, help="The weights it started from: safetensors, or a folder.")
@click.option("--out", type=_PATH, required=True, help="Where to write the weights: safetensors.")
@_KEY
def import_(file: Path, base: Path, out: Path, key: Path | None) -> int:
    """Rebuild the weights of a fine-tune, bit for bit.

    \b
    thinwire import tuned.log --base base.safetensors --out tuned.safetensors

    Another base is refused, and so is a result that is not the run's own. With a key, the log must be signed with it.
    """
    log = _read(file, key)
    with _told(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        found = rebuild_file(log, base, out)
    proved = "the run's own model, to the bit" if log.result else "the log has no digest of it to compare with"
    click.echo(f"{out}  {_extent(log)}, digest {found}: {proved}")
    return DONE


@click.command(short_help="Audit a run from its log.")
@click.argument("file", type=_PATH)
@click.option("--base", type=_PATH, help="The weights it started from, to replay it on.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@_KEY
def replay(file: Path, base: Path | None, as_json: bool, key: Path | None) -> int:
    """Audit a run from its log: who took part, what they said, and whether the model follows from it.

    \b
    thinwire replay tuned.log
    thinwire replay tuned.log --base base.safetensors

    With the base the run is replayed and compared with every digest that it noted. Where they part, the code is 2.
    """
    log = _read(file, key)
    checks: list[Check] = []
    if base is not None:
        with Stored(base, log.aliases) as tensors:
            checks = audit(tensors, log)
    size, signed = file.stat().st_size, is_signed(file.read_bytes())
    if as_json:
        click.echo(json.dumps(_as_dict(log, checks, size, signed)))
    else:
        _show(log, checks, size, signed and (" (the key fits)" if key else " (not checked: no --key)"), base)
    wrong = next((check for check in checks if check.found != check.noted), None)
    if wrong is not None:
        last = max((check.rounds for check in checks if check.rounds < wrong.rounds), default=0)
        after = _extent(log) if log.sums else f"{wrong.rounds} rounds"
        raise StateMismatch(
            f"after {after} the log gives a model with the digest {wrong.found}",
            expected=f"digest {wrong.noted}, which the run noted then",
            mend="have the log written again by another member: sums do not say where they part" if log.sums else
            f"look between rounds {last} and {wrong.rounds}: up to {last} they agree",
        )  # fmt: skip
    return DONE


# --- who said what ---------------------------------------------------------------------------------------------------


@dataclass
class _Said:
    """A member's scalars: in how many rounds, how many; of those abstained, zero, beyond what counts."""

    rounds: int = 0
    scalars: int = 0
    abstained: int = 0
    zero: int = 0
    wild: int = 0


def _members(log: Log) -> dict[int, _Said]:
    clip = log.recipe.clip or math.inf
    said: dict[int, _Said] = {}
    for state, closed in log.states():
        told = log.recipe.decode(state, closed)
        sizes = [abs(g) for scalars in told.values() for g in scalars if not math.isnan(g)]
        median = state.scale.after(sizes, log.recipe.least)[1] if sizes else 0.0
        for member, scalars in told.items():
            its = said.setdefault(member, _Said())
            its.rounds += 1
            its.scalars += len(scalars)
            its.abstained += sum(map(math.isnan, scalars))
            its.zero += sum(g == 0 for g in scalars)
            its.wild += sum(abs(g) > clip * median for g in scalars)
    return dict(sorted(said.items()))


def _as_dict(log: Log, checks: list[Check], size: int, signed: bool) -> dict[str, object]:
    return {
        "bytes": size, "signed": signed, "rounds": len(log.rounds), "recipe": log.recipe.as_dict(), "base": log.base,
        "result": log.result, "scalar_bytes": _scalar_bytes(log), "changes": _changes(log),
        "pool": log.sums and {"directions": len(log.sums.values), "taken": _taken(log.sums)},
        "members": {member: vars(said) for member, said in _members(log).items()},
        "checks": [vars(check) for check in checks],
    }  # fmt: skip


def _show(log: Log, checks: list[Check], size: int, signed: str | bool, base: Path | None) -> None:
    console = Console(highlight=False)
    lrs = [closed.lr for closed in log.rounds] or [0.0]
    told = {
        "rounds": f"{len(log.rounds)}, learning rates from {min(lrs):g} to {max(lrs):g}",
        "scalars": f"{_scalar_bytes(log)} bytes said, {size} bytes of log",
        "members": f"{len({m for closed in log.rounds for m in closed.codes})}, {_changes(log)} joined or left",
    }
    if log.sums:  # which do not say who said what
        told = {"pool": f"{len(log.sums.values)} directions, {_taken(log.sums)} taken, {size} bytes of log"}
    rows = {
        **told,
        "recipe": ", ".join(f"{name}={value!r}" for name, value in log.recipe.as_dict().items()),
        "base": log.base,
        "result": log.result or "not noted",
        "signed": f"yes{signed}" if signed else "no",
    }
    for name, text in rows.items():
        console.print(f"{name:<8} {text}", markup=False)
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    for heading in ("member", "rounds", "scalars", "abstained", "zero", "wild"):
        table.add_column(heading, justify="right")
    for member, said in _members(log).items():
        table.add_row(str(member), *map(str, vars(said).values()))
    if not log.sums:
        console.print(table)
    if base is not None:
        agreed = sum(check.found == check.noted for check in checks)
        console.print(f"replayed on {base}: {agreed} of {len(checks)} noted digests agree", markup=False)


def _extent(log: Log) -> str:
    """How much was closed in it."""
    return f"a pool of {len(log.sums.values)} directions" if log.sums else f"{len(log.rounds)} rounds"


def _taken(sums: Sums) -> int:
    return sum(map(bool, sums.values))


def _scalar_bytes(log: Log) -> int:
    return sum(len(told) for closed in log.rounds for told in closed.codes.values())


def _changes(log: Log) -> int:
    return sum(len(closed.joined) + len(closed.left) for closed in log.rounds)


# --- files -----------------------------------------------------------------------------------------------------------


def _read(path: Path, key: Path | None) -> Log:
    with _told(path):
        return Log.from_bytes(path.read_bytes(), _key(key))


def _key(path: Path | None) -> bytes | None:
    if path is None:
        return None
    with _told(path):
        return key_of(path.read_bytes())


def _check_names(log: Log, tensors: Stored, run: Path) -> None:
    missing = sorted(log.tensors.keys() - set(tensors))
    if missing:
        raise ConfigError(
            f"{run / 'model.safetensors'} has no tensor {missing[0]!r}",
            expected="every tensor that seeds.log says was tuned",
            mend="export a run's folder as it was left",
        )


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the file system says, in our form."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or path}: {error.strerror or error}",
            expected="a file that can be read, or a folder that can be written to",
            mend="look at the path as typed",
        ) from None
