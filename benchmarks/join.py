"""State for newcomers: how long it takes to get it, what crosses after a cut or a change, and whether training notices.

    OMP_NUM_THREADS=1 python benchmarks/join.py [--mb 40 200] [--repeats 3] [--steps 200] [--out FILE.md]

Over HTTP: two members in processes of their own show the state on loopback without a limit on their rate; beside it one
plain stream over a socket, of the same bytes, without digests. Over the link: two donors and a taker, a Gloo group on
loopback. Bytes are of pieces over HTTP, of all messages at the link. Every figure is the median over repeats, with the
least and the most beside it. Training: a small tower of layers steps in a process that shows its state; a reader in
another fetches it over and over, limited to 30 % of an uplink of 100 Mbit/s.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

import thinwire
from thinwire.elastic.exhibit import Exhibit, serve
from thinwire.elastic.fetching import Progress, fetch
from thinwire.elastic.handing import Shelf, hand_over
from thinwire.errors import ThinwireError
from thinwire.units import Rate

TOKEN = "benchmark"
SPAWN = multiprocessing.get_context("spawn")
LIMIT_S = 300.0


def state(megabytes: int, changed: float = 0.0) -> dict[str, Any]:
    """Ten tensors, `changed` of all of them another value than usual."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(megabytes * 25_000, generator=generator) for _ in range(10)]
    for tensor in tensors[: round(10 * changed)]:
        tensor.add_(1.0)
    return {"anchor": tensors, "step": 1}


def show(megabytes: int, pipe: Any) -> None:
    """A member that shows a state until it is told to end."""
    shown = Exhibit(Rate(1e13))
    shown.states()
    shown.publish(1, lambda: state(megabytes))
    with serve(shown, TOKEN) as address:
        pipe.send(address)
        pipe.poll(LIMIT_S)


@contextmanager
def members(count: int, work: Callable[..., None], *arguments: Any) -> Any:
    """Processes, and what each of them says first."""
    with ExitStack() as stack:
        pipes = []
        for _ in range(count):
            ours, theirs = SPAWN.Pipe()
            process = SPAWN.Process(target=work, args=(*arguments, theirs), daemon=True)
            process.start()
            stack.callback(process.join, 10)
            stack.callback(ours.close)
            stack.callback(ours.send, None)
            pipes.append(ours)
        yield [pipe.recv() for pipe in pipes]


def cut_at(share: float) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        if progress.received_bytes >= share * progress.total_bytes:
            raise KeyboardInterrupt

    return tell


def over_http(megabytes: int, repeats: int) -> dict[str, list[tuple[float, int]]]:
    taken: dict[str, list[tuple[float, int]]] = {}
    with members(2, show, megabytes) as addresses, tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            shelves = {"memory": Shelf(), "folder": Shelf(folder=Path(folder) / str(repeat))}
            for name, shelf in shelves.items():
                got = fetch(addresses, TOKEN, shelf).progress
                taken.setdefault(f"HTTP, shelf in {name}", []).append((got.seconds, got.received_bytes))
            shelf = Shelf()
            with suppress(KeyboardInterrupt):
                fetch(addresses, TOKEN, shelf, tell=cut_at(0.5))
            got = fetch(addresses, TOKEN, shelf).progress
            taken.setdefault("HTTP, after a cut at half", []).append((got.seconds, got.received_bytes))
    return taken


def stream(megabytes: int, repeats: int) -> dict[str, list[tuple[float, int]]]:
    """One socket, one stream, nothing checked."""
    content = torch.zeros(megabytes * 1_000_000, dtype=torch.uint8).numpy().data
    taken = []
    for _ in range(repeats):
        with socket.create_server(("127.0.0.1", 0)) as server:

            def give(server: socket.socket = server) -> None:
                with server.accept()[0] as connection:
                    connection.sendall(content)

            thread = threading.Thread(target=give)
            thread.start()
            began, arrived = time.perf_counter(), bytearray(len(content))
            with socket.create_connection(server.getsockname()) as connection:
                view = memoryview(arrived)
                while view:
                    view = view[connection.recv_into(view) :]
            taken.append((time.perf_counter() - began, len(content)))
            thread.join()
    return {"a plain stream, unchecked": taken}


def at_link(rank: int, port: int, megabytes: int, repeats: int, pipe: Any) -> None:
    """Two donors and a taker; the taker tells what it took."""
    whole, newer = state(megabytes), state(megabytes, 0.1)
    taken: dict[str, list[tuple[float, int]]] = {}
    with thinwire.join(f"127.0.0.1:{port}", rank=rank, world=3) as link:

        def hand(name: str, given: dict[str, Any], shelf: Shelf) -> None:
            before, began = link.meter.total().received_bytes, time.perf_counter()
            hand_over(link, (0, 1), (2,), given if rank < 2 else None, None, shelf)
            seconds = time.perf_counter() - began
            taken.setdefault(name, []).append((seconds, link.meter.total().received_bytes - before))

        for _ in range(repeats):
            shelf = Shelf()
            hand("link", whole, shelf)
            hand("link, a tenth changed since", newer, shelf)
    if rank == 2:
        pipe.send(taken)


def over_link(megabytes: int, repeats: int) -> dict[str, list[tuple[float, int]]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ours, theirs = SPAWN.Pipe()
    ranks = [
        SPAWN.Process(target=at_link, args=(rank, port, megabytes, repeats, theirs), daemon=True) for rank in range(3)
    ]
    for process in ranks:
        process.start()
    if not ours.poll(LIMIT_S):
        raise SystemExit("the members at the link did not end")
    taken: dict[str, list[tuple[float, int]]] = ours.recv()
    for process in ranks:
        process.join(10)
    return taken


def read_on(address: str, pipe: Any) -> None:
    """A reader that fetches again and again, and says how many bytes it had."""
    pipe.send("ready")
    before, now = 0, 0

    def tell(progress: Progress) -> None:
        nonlocal now
        now = progress.received_bytes
        if pipe.poll(0):
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        while True:
            with suppress(ThinwireError):
                fetch([address], TOKEN, Shelf(), answers_s=10.0, limit_s=60.0, tell=tell)
            before, now = before + now, 0
    pipe.recv()
    pipe.send(before + now)


def training(steps: int) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(640, 640), nn.GELU()) for _ in range(8)))
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(128, 640)
    shown = Exhibit(Rate(100e6))

    def run(publishes: bool) -> list[tuple[float, float]]:
        """Wall and processor seconds of this process, for each step."""
        taken = []
        for step in range(steps):
            began, cpu = time.perf_counter(), time.process_time()
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
            if publishes and step % 10 == 9:
                shown.publish(step, lambda: {"model": model.state_dict(), "momentum": optimizer.state_dict()})
            taken.append((time.perf_counter() - began, time.process_time() - cpu))
        return taken

    run(False)
    rows: dict[str, list[tuple[float, float]]] = {}
    rates = []
    with serve(shown, TOKEN) as address:
        for _ in range(3):
            rows.setdefault("nothing shown", []).extend(run(False))
            rows.setdefault("shown, nobody reads", []).extend(run(True))
            ours, theirs = SPAWN.Pipe()
            reader = SPAWN.Process(target=read_on, args=(address, theirs), daemon=True)
            reader.start()
            ours.recv()
            began = time.perf_counter()
            rows.setdefault("a reader at its rate", []).extend(run(True))
            ours.send(None)
            if ours.poll(60):
                rates.append(ours.recv() / (time.perf_counter() - began) / 1e6)
            reader.join(10)
    mb = sum(each.nbytes for each in model.state_dict().values()) * 3 / 1e6
    lines = [
        f"State: {mb:.0f} MB; {steps} steps of each, three times in turns, a round every 10. The reader had "
        f"{statistics.median(rates):.2f} MB/s of 3.75.", "",
        "| | a step, median | mean | 10th, 90th percentile | processor time of a step, mean |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, taken in rows.items():
        wall = sorted(each for each, _ in taken)
        low, high = wall[len(wall) // 10], wall[9 * len(wall) // 10]
        cpu = 1e3 * statistics.mean(each for _, each in taken)
        lines.append(
            f"| {name} | {1e3 * statistics.median(wall):.2f} ms | {1e3 * statistics.mean(wall):.2f} ms "
            f"| {1e3 * low:.2f}, {1e3 * high:.2f} ms | {cpu:.2f} ms |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, nargs="*", default=[40, 200])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sizes = " ".join(map(str, given.mb))
    lines = [
        "# State for newcomers", "",
        f"`python benchmarks/join.py --mb {sizes} --repeats {given.repeats} --steps {given.steps}`: torch "
        f"{torch.__version__}, thinwire {thinwire.__version__}, {platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f} as it began.", "",
        "| state | how | seconds | least, most | bytes | MB/s |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for megabytes in given.mb:
        for source in (stream, over_http, over_link):
            for name, taken in source(megabytes, given.repeats).items():
                seconds = sorted(each for each, _ in taken)
                median, size = statistics.median(seconds), statistics.median(each for _, each in taken)
                lines.append(
                    f"| {megabytes} MB | {name} | {median:.2f} | {seconds[0]:.2f}, {seconds[-1]:.2f} | {size:.0f} "
                    f"| {size / median / 1e6:.0f} |"
                )
                print(lines[-1], flush=True)
    lines += ["", "## Training beside a reader", "", *training(given.steps), ""]
    text = "\n".join(lines)
    print(text)
    if given.out is not None:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
