"""Where members run: simulated and as processes, how they end, and that both give the same bits."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import tiny_run

from thinwire.config import SimulatedLink, load, loads
from thinwire.errors import ConfigError, ThinwireError
from thinwire.report.record import RunRecord
from thinwire.train import checkpoint, launch
from thinwire.train.display import Silent
from thinwire.train.launch import execute
from thinwire.units import Duration

SRC = Path(__file__).parents[2] / "src"
FLAGS = "--task.size 0.2M --context 16 --batch-size 2 --validation-windows 8 --eval-every 10 --method diloco --every 5"
LIMIT_S = 90


# ---- in this process


def test_what_a_run_leaves(tmp_path):
    run = tiny_run(tmp_path / "runs" / "one")
    record = execute(run, display=Silent())
    folder = Path(run.out)
    assert {path.name for path in folder.iterdir()} == {
        "run.toml", "record.json", "report.html", "model.safetensors", "checkpoints"
    }  # fmt: skip
    assert load(folder / "run.toml") == run
    assert record is not None
    text = (folder / "record.json").read_text()
    assert text == record.to_json() == RunRecord.from_json(text).to_json()
    page = (folder / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert record.digest in page


@pytest.mark.parametrize("name", ["ddp", "just_one_byte"])
def test_a_simulated_run_is_timed_on_its_clock(tmp_path, name):
    """A step of 2 s, then half a second for what is told; the few bytes of the rest take far less."""
    link = SimulatedLink(rate="unlimited", delay=Duration(0.5), step_time=Duration(2.0))
    run = replace(tiny_run(tmp_path, name, {}, steps=4, workers=2), link=link, eval_every=0, checkpoint_every=0)
    record = execute(run, display=Silent())
    assert record is not None
    assert record.seconds >= 4 * 2.5
    assert all(member.compute_s >= 4 * 2.0 for member in record.members)
    assert all(4 * 0.5 <= member.wait_s <= record.seconds - 4 * 2.0 for member in record.members)


def test_a_new_run_does_not_write_over_an_old_one(tmp_path):
    run = tiny_run(tmp_path, steps=4)
    execute(run, display=Silent())
    with pytest.raises(ConfigError) as caught:
        execute(run, display=Silent())
    assert str(caught.value) == (
        f"{tmp_path} holds the checkpoints of an earlier run\n"
        "  expected  a folder of its own for a new run\n"
        f"  mend      go on with it: thinwire train --resume {tmp_path}; or choose another folder with --out"
    )
    assert execute(run, display=Silent(), resume=True) is not None


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        execute(tiny_run(tmp_path / "file" / "run"), display=Silent())
    assert str(caught.value) == (
        f"--out {tmp_path}/file/run: Not a directory\n"
        "  expected  a folder that can be written into\n"
        "  mend      name another one with --out, or make room"
    )


def test_a_report_that_cannot_be_written_is_an_error_of_three_parts(tmp_path):
    (tmp_path / "record.json").mkdir()
    with pytest.raises(ThinwireError) as caught:
        execute(tiny_run(tmp_path, steps=4), display=Silent())
    assert caught.value.wrong.startswith(f"{tmp_path}/record.json could not be written: ")
    (tmp_path / "record.json").rmdir()
    assert execute(tiny_run(tmp_path, steps=4), display=Silent(), resume=True) is not None


def test_ctrl_c_asks_and_a_second_one_ends(capsys):
    with launch.stop_signal() as stops:
        assert not stops()
        signal.raise_signal(signal.SIGTERM)
        assert stops()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr().err == "Stopping as soon as all members know; press Ctrl-C again to stop at once.\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_a_group_forms_is_the_systems_own():
    with launch._plain_ctrl_c():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Ended:
    """What is left of a process."""

    def __init__(self, returncode: int) -> None:
        self.returncode = returncode


LOST = "thinwire: lost member 1 during round 3, fragment 0: Connection closed by peer"


@pytest.mark.parametrize(
    ("codes", "words", "wrong"),
    [
        ([2, -9, 2], ["", "", LOST], "member 1 was killed by SIGKILL"),
        (
            [2, 2, 1],
            ["", LOST, "Traceback\nValueError: x"],
            "member 2 failed, exit code 1\n    Traceback\n    ValueError: x",
        ),
        ([2, 2, 2], ["", LOST, "thinwire: no data"], "member 2 failed, exit code 2\n    thinwire: no data"),
        ([2, 2, 2], ["", LOST, LOST], "member 0 failed, exit code 2"),
        ([0, 0, 2], ["", "", "thinwire: full"], "member 2 failed, exit code 2\n    thinwire: full"),
    ],
)
def test_who_failed_first_is_named(tmp_path, codes, words, wrong):
    logs = [tmp_path / "logs" / f"member-{index}.log" for index in range(3)]
    logs[0].parent.mkdir()
    for log, text in zip(logs[1:], words[1:], strict=True):
        log.write_text(text)
    error = launch._failure([Ended(code) for code in codes], logs)
    assert error.wrong == f"the run ended early: {wrong}"
    assert error.mend.endswith("; there is no checkpoint yet")
    checkpoint.save(tmp_path, 5, 0, {})
    error = launch._failure([Ended(code) for code in codes], logs)
    assert error.mend.endswith(f"; go on with: thinwire train --resume {tmp_path}")


# ---- processes


def start(*words: object, **kwargs) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment |= {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **kwargs,
    )


def train(*words: object) -> subprocess.Popen:
    return start("thinwire", "train", *FLAGS.split(), *words)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def wait_for_line(process: subprocess.Popen, words: str) -> str:
    """Read on until a line has these words."""
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(f"it ended without {words!r}: {process.stderr.read() if process.stderr else ''}")


def record_of(folder: Path) -> RunRecord:
    return RunRecord.from_json((folder / "record.json").read_text())


def digest(folder: Path) -> str:
    return record_of(folder).digest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> RunRecord:
    """The simulated run of 60 steps on two members, never stopped."""
    folder = tmp_path_factory.mktemp("reference")
    code, _, err = end(train("--steps", 60, "--link", "simulated", "--out", folder))
    assert (code, err) == (0, "")
    return record_of(folder)


@pytest.mark.slow
def test_processes_give_the_bits_of_the_simulation(tmp_path, reference):
    code, out, err = end(train("--steps", 60, "--out", tmp_path))
    assert (code, err) == (0, "")
    record = record_of(tmp_path)
    assert record.digest == reference.digest
    evaluated = [(p.step, p.valid_loss) for p in record.curve if p.valid_loss is not None]
    assert evaluated == [(p.step, p.valid_loss) for p in reference.curve if p.valid_loss is not None]
    assert record.clock == "wall"
    assert record.digest in out
    assert out.count("report ") == 1
    for log in (tmp_path / "logs").iterdir():
        assert log.read_text() == ""


@pytest.mark.slow
def test_torchrun_and_join_give_them_too(tmp_path, reference):
    torchrun = start(
        "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port(),
        "-m", "thinwire", "train", *FLAGS.split(), "--steps", 60, "--out", tmp_path / "torchrun",
    )  # fmt: skip
    code, out, err = end(torchrun)
    assert code == 0, err
    assert out.count("report ") == 1
    assert digest(tmp_path / "torchrun") == reference.digest
    where = f"127.0.0.1:{free_port()}"
    members = [
        train("--steps", 60, "--join", where, "--rank", rank, "--world", 2, "--out", tmp_path / str(rank))
        for rank in (1, 0)
    ]
    (code1, out1, err1), (code0, out0, err0) = map(end, members)
    assert (code0, err0, code1, err1) == (0, "", 0, "")
    assert digest(tmp_path / "0") == reference.digest
    assert f"Done; member 0 has the report and the weights, whose digest is {reference.digest}." in out1
    assert "60/60" in out0
    assert load(tmp_path / "1" / "run.toml").link.rank == 1


@pytest.mark.slow
@pytest.mark.parametrize("link", ["simulated", "torch"])
def test_ctrl_c_and_the_command_it_prints(tmp_path, reference, link):
    """An orderly end, code 130, and a resume that ends where the run that never stopped did."""
    folder = tmp_path / "a run"
    process = train("--steps", 4000, "--link", link, "--out", folder)
    wait_for_line(process, "10/4000")
    process.send_signal(signal.SIGINT)
    code, out, err = end(process)
    assert code == 130, err
    assert err == "Stopping as soon as all members know; press Ctrl-C again to stop at once.\n"
    stopped = int(re.search(r"after step (\d+)\.", out)[1])
    assert checkpoint.steps(folder, 0) >= {stopped}
    command = re.search(r"Go on with:  (thinwire train --resume '.*')\n", out)[1]
    assert command == f"thinwire train --resume '{folder}'"
    code, _, err = end(start("thinwire", "train", "--resume", folder, "--steps", max(60, stopped)))
    assert code == 0, err
    if stopped <= 60:
        assert digest(folder) == reference.digest
    else:  # this machine was fast
        whole = tmp_path / "whole"
        assert end(train("--steps", stopped, "--link", "simulated", "--out", whole))[0] == 0
        assert digest(folder) == digest(whole)


@pytest.mark.slow
@pytest.mark.parametrize("link", ["simulated", "torch"])
def test_two_ctrl_c_end_at_once(tmp_path, link):
    process = train("--steps", 100000, "--link", link, "--out", tmp_path)
    wait_for_line(process, "10/100000")
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)  # not a wait for anything: signals that arrive together count as one
    code, _, err = end(process)
    assert code in (130, -signal.SIGINT)  # the latter if one more arrived when Python had said goodbye
    assert "Traceback" not in err
    assert "terminate" not in err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_while_joining(tmp_path, rank):
    """The engine may wait for minutes there, deaf to Python's own handler."""
    process = train(
        "--steps", 60, "--join", f"127.0.0.1:{free_port()}", "--rank", rank, "--world", 2, "--out", tmp_path
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "waiting for member" in line:
            break
    process.send_signal(signal.SIGINT)
    assert end(process)[0] in (130, -signal.SIGINT)  # a shell shows 130 for both


@pytest.mark.slow
def test_a_member_that_is_killed(tmp_path):
    """The others name it, keep what was committed and end with code 2; the run goes on from there."""
    process = train("--steps", 5000, "--workers", 3, "--checkpoint-every", 20, "--out", tmp_path, "--json")
    line = json.loads(wait_for_line(process, '"step": 30'))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        os.killpg(process.pid, signal.SIGKILL)
        pytest.skip("needs /proc to find the members")
    victims = [
        int(pid) for pid in children.read_text().split() if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    ]
    os.kill(victims[0], signal.SIGKILL)
    code, out, err = end(process)
    assert code == 2
    assert all(json.loads(each) for each in out.splitlines())
    assert "thinwire: the run ended early: member 1 was killed by SIGKILL\n" in err
    assert re.search(r"thinwire: lost members? [\d, ]*1[\d, ]* during ", err)
    assert f"go on with: thinwire train --resume {tmp_path}" in err
    assert "Traceback" not in err
    newest = max(checkpoint.steps(tmp_path, 0) | checkpoint.steps(tmp_path, 2))
    committed = checkpoint.load(tmp_path, newest, 0 if newest in checkpoint.steps(tmp_path, 0) else 2)["sync"][
        "committed"
    ]
    assert newest >= line["step"]
    assert newest // 5 - 1 <= committed <= newest // 5  # a round every 5 steps; the last one may have been under way
    target = newest - newest % 5 + 10
    code, _, err = end(start("thinwire", "train", "--resume", tmp_path, "--steps", target))
    assert code == 0, err
    record = record_of(tmp_path)
    assert record.rounds_committed == committed + 2
    assert "goes on from member" in (tmp_path / "logs" / "member-1.log").read_text()


@pytest.mark.slow
def test_members_that_were_told_different_things(tmp_path):
    where = f"127.0.0.1:{free_port()}"
    members = [
        train("--steps", 60 + rank, "--join", where, "--rank", rank, "--world", 2, "--out", tmp_path / str(rank))
        for rank in (0, 1)
    ]
    for code, _, err in map(end, members):
        assert code == 2
        assert err == (
            "thinwire: members disagree on steps: member 1 has 61; the others have 60\n"
            "  expected  the same steps on all members\n"
            "  mend      give all members the same configuration\n"
        )


@pytest.mark.slow
def test_an_error_in_all_members_is_told_once(tmp_path):
    code, _, err = end(train("--steps", 20, "--lr", "1e20", "--out", tmp_path))
    assert code == 2
    assert err.count("no member had finite values to contribute") == 1
    assert "Traceback" not in err
    assert err.count("thinwire: ") == 2


def test_the_configuration_on_disk_is_the_run(tmp_path):
    run = tiny_run(tmp_path, steps=4, workers=1)
    record = execute(run, display=Silent())
    assert record is not None
    assert loads(record.config) == run == load(tmp_path / "run.toml")
    assert load_file(tmp_path / "model.safetensors")
