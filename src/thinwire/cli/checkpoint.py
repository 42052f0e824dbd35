"""`thinwire checkpoint`: look at checkpoints, check them, and make them fit another group."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thinwire.cli import DONE
from thinwire.errors import ConfigError
from thinwire.train import checkpoint as files
from thinwire.train import pretrained, universal
from thinwire.train.gathering import Inner, check_agree, gather
from thinwire.units import Size

_PATH = click.Path(path_type=Path)
_SHARD_BYTES = 5 * 10**9


@click.group()
def checkpoint() -> None:
    """Look at checkpoints, check or convert them."""


@checkpoint.command()
@click.argument("place", type=_PATH, metavar="FOLDER|FILE")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def inspect(place: Path, as_json: bool) -> int:
    """Show what checkpoints a run's folder has, or what a universal checkpoint holds.

    Digests of members' files are those noted in them: `thinwire checkpoint verify` reads the files and compares.
    """
    if place.is_dir():
        found = _folder(place)
        click.echo(json.dumps(found)) if as_json else _show_folder(found)
    else:
        made = universal.read(place)
        click.echo(json.dumps(_universal(place, made))) if as_json else _show_universal(place, made)
    return DONE


@checkpoint.command()
@click.argument("place", type=_PATH, metavar="FOLDER|FILE")
def verify(place: Path) -> int:
    """Read every file, compare it with its digest, and members' anchors with each other.

    The first fault ends with exit code 2 and names the file.
    """
    if not place.is_dir():
        made = universal.read(place)
        click.echo(f"{place}  step {made.step}, {len(made.records)} records, digest {made.digest}: intact")
        return DONE
    for step, ranks in _steps(place).items():
        states = {rank: files.load(place, step, rank) for rank in ranks}
        check_agree(place, step, states)
        members = states[ranks[0]]["members"]
        lacking = sorted(set(range(members)) - set(ranks))
        told = f"; no file of members {', '.join(map(str, lacking))}" if lacking else ""
        click.echo(f"step {step}  {len(ranks)} of {members} members intact, and agreed{told}")
    return DONE


@checkpoint.command()
@click.argument("place", type=_PATH, metavar="FOLDER|FILE")
@click.argument("out", type=_PATH)
@click.option("--step", type=int, help="Of which step; the newest that is whole, if not given.")
@click.option("--members", metavar="0,1,...", help="Members to take; all, if not given.")
@click.option(
    "--inner", type=click.Choice(["mean", "copy", "reset"]), default="mean", show_default=True,
    help="The inner optimizers' state: the members' mean, the first member's, or none.",
)  # fmt: skip
@click.option(
    "--to", "kind", type=click.Choice(["universal", "weights", "hf"]), default="universal", show_default=True,
    help="A checkpoint for any group; the model's weights alone; or a folder that Hugging Face libraries load.",
)  # fmt: skip
@click.option("--shard-size", metavar="SIZE", help="With --to hf: of a weights file at most.  [default: 5GB]")
def convert(
    place: Path, out: Path, step: int | None, members: str | None, inner: Inner, kind: str, shard_size: str | None
) -> int:
    """Make a universal checkpoint of a run's: one record a parameter, for any number of members.

    \b
    thinwire checkpoint convert runs/four four.safetensors
    thinwire train --from four.safetensors --workers 3 --out runs/three
    thinwire checkpoint convert four.safetensors model.safetensors --to weights
    thinwire checkpoint convert runs/four four --to hf

    What of the members' states has no place there is told, and by what rule the rest was taken.
    """
    shard_bytes = _shard_bytes(shard_size, kind)
    if place.is_dir():
        made = gather(place, step=step, ranks=_ranks(members), inner=inner)
    elif step is not None or members is not None or kind == "universal":
        raise ConfigError(
            f"convert {place} {out}: a file already holds one step of no members in particular",
            expected="a run's folder; or a universal checkpoint and --to weights or --to hf",
            mend="name the folder, or leave --step and --members out and say --to weights or --to hf",
        )
    else:
        made = universal.read(place)
    with _told(out):
        if kind == "weights":
            _write_weights(out, made)
            click.echo(f"{out}  weights of step {made.step}")
            return DONE
        if kind == "hf":
            click.echo(f"{out}  step {made.step}: {pretrained.write(out, made, shard_bytes=shard_bytes)}")
            return DONE
        whole = universal.write(out, made)
    click.echo(f"{out}  step {made.step}, {len(made.records)} records, {out.stat().st_size} bytes, digest {whole}")
    for text in made.told:
        click.echo(f"  {text}")
    return DONE


def _write_weights(out: Path, made: universal.Universal) -> None:
    """The model's state, each tensor in its own dtype: what a run leaves as model.safetensors."""
    if out.exists():
        raise ConfigError(
            f"{out} is there already", expected="a name that is free", mend="choose another one, or remove the file"
        )
    state = pretrained.weights(made)
    files.write_whole(out, {name: value.clone().contiguous() for name, value in state.items()}, {"format": "pt"})


def _shard_bytes(words: str | None, kind: str) -> int:
    if words is None:
        return _SHARD_BYTES
    if kind != "hf":
        raise ConfigError(
            f"--shard-size {words} with --to {kind}: that is one file",
            expected="--shard-size with --to hf",
            mend="leave --shard-size out",
        )
    if not (found := Size.parse(words).bytes):
        raise ConfigError(f"--shard-size {words}", expected="more than 0 bytes", mend="--shard-size 5GB")
    return found


def _ranks(words: str | None) -> list[int] | None:
    if words is None:
        return None
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise ConfigError(
            f"--members {words}", expected="ranks with commas between them", mend="--members 0,2,3"
        ) from None


def _steps(folder: Path) -> dict[int, tuple[int, ...]]:
    found = files.all_steps(folder)
    if not found:
        raise ConfigError(
            f"no checkpoint in {folder}",
            expected="a folder that a run has written checkpoints into, or a universal checkpoint",
            mend="name the run's own folder, which has a folder `checkpoints` in it",
        )
    return found


def _folder(folder: Path) -> dict[str, Any]:
    steps = []
    for step, ranks in _steps(folder).items():
        paths = {rank: files.file_of(folder, step, rank) for rank in ranks}
        read = {rank: files.summary(path) for rank, path in paths.items()}
        state = read[ranks[0]][0]
        steps.append({
            "step": step,
            "members": state["members"],
            "method": state["sync"].get("answers", "by seeds and scalars"),
            "optimizer": state["optimizer_name"],
            "files": [
                {"member": rank, "path": str(paths[rank]), "bytes": paths[rank].stat().st_size, "digest": read[rank][1]}
                for rank in ranks
            ],
        })  # fmt: skip
    return {"folder": str(folder), "steps": steps}


def _universal(path: Path, made: universal.Universal) -> dict[str, Any]:
    return {
        "file": str(path), "format": universal.FORMAT, "step": made.step, "members": made.members,
        "method": dict(made.answers), "optimizer": made.optimizer, "samples": made.position,
        "bytes": path.stat().st_size, "digest": made.digest, "told": list(made.told),
        "records": [
            {"name": name, "role": r.role, "shape": list(r.value.shape), "dtype": r.dtype, "outer": sorted(r.outer),
             "inner": sorted(r.inner)}
            for name, r in made.records.items()
        ],
    }  # fmt: skip


def _show_folder(found: dict[str, Any]) -> None:
    console = Console()
    for step in found["steps"]:
        console.print(
            f"[bold]step {step['step']}[/]  {len(step['files'])} of {step['members']} members", highlight=False
        )
        _show_method(console, step)
        table = Table.grid(padding=(0, 2))
        for each in step["files"]:
            table.add_row(f"  member {each['member']}", f"{each['bytes']} bytes", each["digest"])
        console.print(table)


def _show_universal(path: Path, made: universal.Universal) -> None:
    found, console = _universal(path, made), Console()
    told = f"of {made.members} members, {made.position} samples, {found['bytes']} bytes, digest {made.digest}"
    console.print(f"[bold]step {made.step}[/]  {told}", highlight=False, soft_wrap=True)
    _show_method(console, found)
    table = Table.grid(padding=(0, 2))
    for each in found["records"]:
        state = ", ".join([*(f"outer {key}" for key in each["outer"]), *(f"inner {key}" for key in each["inner"])])
        table.add_row(
            f"  {escape(each['name'])}", each["role"], f"{each['shape']}".replace("[", "\\["), each["dtype"], state
        )
    console.print(table)
    for text in made.told:
        console.print(f"  {escape(text)}", highlight=False, soft_wrap=True)


def _show_method(console: Console, found: dict[str, Any]) -> None:
    method = found["method"]
    words = method if isinstance(method, str) else "; ".join(f"{name} {answer}" for name, answer in method.items())
    console.print(f"  method     {escape(words)}", highlight=False, soft_wrap=True)
    console.print(f"  optimizer  {found['optimizer']}", highlight=False)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} could not be written: {error.strerror or error}",
            expected="room on the disk, and permission to write there",
            mend="make room, or write elsewhere",
        ) from error
