"""A member's stay among others, over a fixed group that plays an elastic one."""

import json
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import thinwire.train.elastic as elastic
from thinwire.collectives import gather_packets
from thinwire.config import MethodOptions, Run
from thinwire.elastic.board import Board
from thinwire.elastic.journal import Journal, read
from thinwire.elastic.proof import prove
from thinwire.errors import ConfigError
from thinwire.links.local import run as simulate
from thinwire.packet import Header, Packet
from thinwire.rounds import Committed
from thinwire.synchronizer import synchronize
from thinwire.train.display import Silent
from thinwire.train.elastic import Stay, load_newest, newest, train_among
from thinwire.train.text import TextOptions

TASK = TextOptions(size="0.2M", context=8, batch_size=2, validation_windows=2)
RUN = Run(steps=12, eval_every=4, checkpoint_every=8, task=TASK, method=MethodOptions("diloco", {"every": 4}))


class Fixed:
    """A simulated link with names, which tells beside rounds as an elastic one does."""

    def __init__(self, link) -> None:
        self.link, self.name = link, f"m{link.rank}"
        self.names = tuple(f"m{rank}" for rank in link.members)
        self.carried = {}

    def __getattr__(self, name):
        return getattr(self.link, name)

    def carry(self, key, save, load) -> None:
        self.carried[key] = (save, load)

    def beside_rounds(self, tell, hear) -> None:
        self.tell, self.hear = tell, hear

    def on_change(self, tell) -> None:
        self.changed = tell

    def told(self) -> Mapping[int, tuple[int, ...]]:
        packet = Packet("int64", 8, {"n": torch.tensor(self.tell())}, Header(sender=self.rank))
        layout = {"n": (torch.int64, 8)}
        found = gather_packets(self.link.open("told"), self.rank, self.members, packet, layout, "told")
        return {rank: tuple(packet.fields["n"].tolist()) for rank, packet in found.items()}


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    """Committed rounds are told of, as the synchronizer of an elastic link does."""

    def told(model, optimizers, plan, group, *, seed, observer):
        def observe(outcome):
            if isinstance(outcome, Committed):
                group.hear(outcome, group.told())
            observer(outcome)

        return synchronize(model, optimizers, plan, group.link, seed=seed, observer=observe)

    monkeypatch.setattr(elastic, "synchronize", told)


def stays(tmp_path, run=RUN, *, members=2, stops=lambda rank: False, **more):
    task, boards = run.task.build(seed=0), {}

    def member(link):
        group = Fixed(link)
        boards[group.name] = Board(group.name, {})
        journal = Journal(tmp_path / "members" / f"{group.name}.jsonl")
        stay = Stay(tmp_path, **more)
        return train_among(
            run, task, group, stay, board=boards[group.name], journal=journal, display=Silent(),
            stops=lambda: stops(link.rank),
        )  # fmt: skip

    return simulate(members, member), boards


def events(tmp_path, name="m0"):
    return [json.loads(line) for line in (tmp_path / "members" / f"{name}.jsonl").read_text().splitlines()]


def test_a_run_from_the_first_step_to_the_last(tmp_path):
    records, boards = stays(tmp_path)
    lines = events(tmp_path)
    told = ["joined", *["round", "evaluated"], *["round", "evaluated", "saved"], "round", "evaluated", "saved", "ended"]
    assert [line["event"] for line in lines] == told
    rounds = [line for line in lines if line["event"] == "round"]
    assert [line["units"] for line in rounds] == [
        {"m0": [[0, 4]], "m1": [[4, 4]]}, {"m0": [[8, 4]], "m1": [[12, 4]]}, {"m0": [[16, 4]], "m1": [[20, 4]]},
    ]  # fmt: skip
    assert rounds == [
        line | {"at": mine["at"]} for line, mine in zip(_rounds(events(tmp_path, "m1")), rounds, strict=True)
    ]
    assert lines[-1]["why"] == "step 12 was the last"
    assert (tmp_path / "model.safetensors").exists()
    assert records[0].digest == records[1].digest
    assert records[0].final["loss"] == lines[-3]["loss"]
    assert boards["m1"].view({})["run"]["step"] == 12
    assert boards["m1"].view({})["members"][0]["units"] == 12


def _rounds(lines):
    return [line for line in lines if line["event"] == "round"]


def test_the_logs_prove_the_ledger(tmp_path):
    stays(tmp_path, members=3)
    proof = prove(read(tmp_path))
    assert (proof.rounds, proof.void, proof.wrong) == (3, 0, ())
    assert proof.beyond == 36


def test_batches_are_the_ledgers_units(tmp_path, monkeypatch):
    asked = []
    plain = type(TASK.build(seed=0)).batch
    monkeypatch.setattr(
        type(TASK.build(seed=0)), "batch", lambda self, *where: asked.append(where) or plain(self, *where)
    )
    stays(tmp_path, replace(RUN, steps=4, optimizer=replace(RUN.optimizer, accumulate=2)))
    assert sorted(asked) == [(unit, 0, 1) for unit in range(16)]


def test_the_run_ends_with_its_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(type(TASK.build(seed=0)), "units_per_epoch", 9)
    stays(tmp_path, epochs=2)
    lines = events(tmp_path)
    assert lines[-1]["why"] == "all units are done"
    assert lines[-1]["epochs"] == 2
    proof = prove(read(tmp_path))
    assert (proof.epochs, sum(proof.by.values()), proof.beyond, proof.wrong) == (2, 18, 0, ())


def test_who_is_asked_to_leave_finishes_its_round(tmp_path):
    records, _ = stays(tmp_path, members=1, stops=lambda rank: True)
    assert records == [None]
    lines = events(tmp_path)
    assert [line["event"] for line in lines] == ["joined", "round", "evaluated", "saved", "ended"]
    assert lines[-1]["why"] == "left: it was asked to"
    assert newest(tmp_path) == (tmp_path / "members" / "m0", 4)


def test_a_checkpoint_holds_the_ledger(tmp_path):
    stays(tmp_path)
    state = load_newest(tmp_path)
    assert state["ledger"]["done"] == [[0, 24]]


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    stays(tmp_path, members=1)
    _, step = newest(tmp_path)
    assert step == 12
    file = tmp_path / "members" / "m0" / "checkpoints" / "step-00000012" / "member-0.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert load_newest(tmp_path)["sync"]["step"] == 8
    assert load_newest(tmp_path / "nowhere") is None


def test_no_second_genesis(tmp_path):
    with pytest.raises(ConfigError, match="the run has begun, and nobody who is here holds its state"):
        stays(tmp_path, members=1, begun=True)


def test_tuning_by_seeds_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="method just_one_byte among members that come and go"):
        stays(tmp_path, replace(RUN, method=MethodOptions("just_one_byte")), members=1)


def test_changes_are_logged_and_shown(tmp_path):
    link = SimpleNamespace(rank=0, members=(0, 1), now=lambda: 0.0, open=lambda purpose: None, timings=None)
    board, group = Board("m0", {}), Fixed(link)
    journal = Journal(tmp_path / "members" / "m0.jsonl")
    task = TASK.build(seed=0)
    session = elastic._Session(
        RUN, task, group, task.model(), [], Stay(tmp_path), board, journal, Silent(), lambda: False,
        torch.device("cpu"), RUN.method.build(),
    )  # fmt: skip
    group.changed(
        SimpleNamespace(names=("m0", "m2"), came=("m2",), left=("m1",), healed=True, seconds=2.0, received_bytes=7)
    )
    session.find("slow", "m2", "three rounds in a row")
    met, healed, finding = events(tmp_path)
    assert (met["names"], met["came"], met["left"]) == (["m0", "m2"], ["m2"], ["m1"])
    assert (healed["event"], healed["bytes"]) == ("healed", 7)
    assert (finding["kind"], finding["who"]) == ("slow", "m2")
    view = board.view({})
    assert view["findings"][0]["evidence"] == "three rounds in a row"
    assert view["changes"][0]["left"] == ["m1"]
