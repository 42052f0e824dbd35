"""Universal checkpoints: the anchor to the bit for any group, nothing lost without a word, never half a file."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import TinyTask, Watcher, carry_out, tiny_run
from torch import Tensor, nn

import small
from thinwire.config import MethodOptions
from thinwire.errors import ConfigError
from thinwire.links.base import Link
from thinwire.links.local import run as simulate
from thinwire.links.network import Network
from thinwire.train import adopting, checkpoint, universal
from thinwire.train.display import Silent
from thinwire.train.gathering import check_agree, gather
from thinwire.train.loop import train
from thinwire.train.optimizer import OptimizerOptions


@dataclass
class Dry(TinyTask):
    """Without dropout: nobody draws, so that a new group can repeat the old one; data goes by samples of the group."""

    def model(self) -> nn.Module:
        hidden = nn.Linear(small.WIDTH, self.width)
        return nn.Sequential(hidden, nn.Tanh(), nn.Linear(self.width, small.CLASSES))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A run of four members with outer momentum, lost after its checkpoint of step 16; a round every 4."""
    folder = tmp_path_factory.mktemp("four") / "run"
    carry_out(tiny_run(folder, workers=4))
    shutil.rmtree(folder / "checkpoints" / "step-00000020")
    return folder


def made(folder: Path, **choices: object) -> Path:
    path = folder.parent / f"{len(list(folder.parent.iterdir()))}.safetensors"
    universal.write(path, gather(folder, **choices))  # type: ignore[arg-type]
    return path


def anchor_of(folder: Path, step: int, rank: int) -> Tensor:
    fragments = checkpoint.load(folder, step, rank)["sync"]["fragments"]
    return torch.cat([fragment["anchor"] for fragment in fragments])


def told_by(run, start: Path, task: TinyTask | None = None) -> list[str]:
    watcher = Watcher()
    carry_out(run, start=start, display=watcher, task=task)
    return [event.text for event in watcher.events if event.kind == "from a checkpoint"]


# ---- the anchor


@pytest.mark.parametrize("members", [1, 2, 3, 7])
def test_the_anchor_is_the_same_to_the_bit_for_any_number_of_members(four, tmp_path, members):
    start = made(four)
    before = anchor_of(four, 16, 0)
    run = tiny_run(
        tmp_path / "on", "diloco", {"every": 50}, workers=members, steps=17, checkpoint_every=1, eval_every=0
    )
    carry_out(run, start=start)  # no round before the end: the anchors are those that it began with
    for rank in range(members):
        assert torch.equal(anchor_of(tmp_path / "on", 17, rank), before)


def test_training_goes_on(four, tmp_path):
    start = made(four)
    record = carry_out(tiny_run(tmp_path / "on", workers=3, steps=36, eval_every=20), start=start)
    assert record is not None
    assert len(record.members) == 3
    assert record.final["loss"] < 0.9 * record.curve[0].valid_loss
    assert record.rounds_committed == 9  # those of the first 16 steps, too
    assert sum(member.samples for member in record.members) == (16 * 4 + 20 * 3) * 8
    steps = [point.step for point in record.curve]
    assert steps == sorted(steps)
    assert {0, 15, 20, 36} <= set(steps)


@pytest.mark.parametrize(
    ("method", "options", "codec"),
    [
        ("ddp", {}, None),
        ("local_sgd", {"every": 50}, None),
        ("diloco", {"every": 50}, "topk(1/4) | int4"),
        ("streaming", {"every": 48, "fragments": 2}, None),
        ("noloco", {"every": 50}, None),
        ("post_local_sgd", {"switch": 8, "every": 50}, None),  # in its second phase by then
        ("streaming", {"every": 17, "fragments": 1, "overlap": 1}, None),
    ],
)
def test_another_method_or_codec_begins_with_the_same_parameters(four, tmp_path, method, options, codec):
    """Of the anchor, before a step was made: the evaluation of the model at the start is that of the anchor."""
    start, seen = made(four), {}

    class Looking(TinyTask):
        def loss(self, model, batch):
            seen.setdefault(len(seen), torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]))
            return super().loss(model, batch)

    given = options if codec is None else {**options, "codec": codec}
    run = tiny_run(tmp_path / "on", method, given, workers=3, steps=17)
    assert carry_out(run, start=start, task=Looking()) is not None
    assert torch.equal(seen[0], anchor_of(four, 16, 0))


@pytest.mark.parametrize(("method", "options"), [("ddp", {}), ("diloco", {"every": 4}), ("local_sgd", {"every": 8})])
def test_where_nothing_is_lost_a_new_group_repeats_the_old_one(tmp_path, method, options):
    """At a round's end, without inner state or dropout, all that a member remembers is in the checkpoint."""
    name = "AdamW" if method == "ddp" else "SGD"  # of gradients all members have one inner state, to the bit
    run = tiny_run(tmp_path / "run", method, options, eval_every=0, optimizer=OptimizerOptions(name, lr=1e-2))
    whole = carry_out(run, task=Dry())
    again = carry_out(replace(run, out=str(tmp_path / "on")), start=made(tmp_path / "run", step=16), task=Dry())
    assert again.digest == whole.digest
    assert again.final == whole.final
    assert again.rounds_committed == whole.rounds_committed
    assert sum(m.samples for m in again.members) == sum(m.samples for m in whole.members)


def test_outer_momentum_goes_along_into_other_fragments(four, tmp_path):
    start = made(four)
    options = {"every": 48, "fragments": 2, "outer": "nesterov(0.6, 0.9)"}
    carry_out(tiny_run(tmp_path / "on", "streaming", options, workers=2, steps=18, checkpoint_every=1), start=start)
    records = universal.read(start).records
    sync = checkpoint.load(tmp_path / "on", 17, 1)["sync"]
    for names, fragment in zip(sync["layout"], sync["fragments"], strict=True):
        wanted = torch.cat([records[name].outer["momentum_buffer"].reshape(-1) for name in names])
        assert torch.equal(fragment["memory"]["momentum_buffer"], wanted)
        assert bool(wanted.any())
    assert sync["fragments"][0]["committed"] == 4


def test_members_of_gossip_give_their_mean(tmp_path):
    carry_out(tiny_run(tmp_path / "run", "noloco", {"every": 4}, workers=3))
    found = gather(tmp_path / "run", step=16)
    rows = [checkpoint.load(tmp_path / "run", 16, rank)["model"]["0.weight"] for rank in range(3)]
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(found.records["0.weight"].value, torch.stack(rows).mean(dim=0))
    assert "each member has a model of its own: their mean is taken, of members 0, 1, 2" in found.told


# ---- inner optimizer state


def rows_of(folder: Path, key: str, index: int = 0) -> list[Tensor]:
    return [checkpoint.load(folder, 16, r)["optimizers"][0]["state"][index][key] for r in range(4)]


def test_inner_state_is_the_mean_a_copy_or_none(four):
    rows = rows_of(four, "exp_avg")
    assert torch.equal(gather(four).records["0.weight"].inner["exp_avg"], torch.stack(rows).mean(dim=0))
    assert torch.equal(gather(four, inner="copy").records["0.weight"].inner["exp_avg"], rows[0])
    assert torch.equal(gather(four, inner="copy", ranks=[2, 3]).records["0.weight"].inner["exp_avg"], rows[2])
    assert all(not record.inner for record in gather(four, inner="reset").records.values())
    assert float(gather(four).records["0.weight"].inner["step"]) == 16


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        ("mean", "inner optimizer state: the mean of members 0, 1, 2, 3’s, of counts the largest"),
        ("copy", "inner optimizer state: a copy of members 0’s"),
        ("reset", "inner optimizer state: not taken, as asked"),
    ],
)
def test_the_rule_for_inner_state_is_told(four, inner, words):
    assert words in gather(four, inner=inner).told


def test_every_member_has_the_inner_state(four, tmp_path):
    start = made(four)
    optimizer = OptimizerOptions(lr=1e-2, options={"betas": [1.0 - 1e-9, 1.0 - 1e-9]})  # what is there nearly stays
    run = tiny_run(tmp_path / "on", "diloco", {"every": 50}, workers=2, steps=18, checkpoint_every=1)
    carry_out(replace(run, optimizer=optimizer), start=start)
    wanted = universal.read(start).records["0.weight"].inner["exp_avg"]
    for rank in range(2):
        state = checkpoint.load(tmp_path / "on", 17, rank)["optimizers"][0]
        assert torch.allclose(state["state"][0]["exp_avg"], wanted, rtol=0, atol=1e-6)
        assert float(state["state"][0]["step"]) == 17
        assert state["param_groups"][0]["betas"][0] == 1.0 - 1e-9  # settings are the run's own


def test_another_optimizer_has_no_use_for_it(four, tmp_path):
    run = tiny_run(tmp_path / "on", workers=2, steps=18, optimizer=OptimizerOptions("SGD", lr=1e-2))
    assert "inner optimizer state of AdamW: SGD has no use for it" in told_by(run, made(four))


# ---- what is told


def test_what_a_run_takes_over_is_told(four, tmp_path):
    run = tiny_run(tmp_path / "on", "local_sgd", {"every": 4}, workers=3, steps=20)
    told = told_by(run, made(four))
    assert told[0] == "step 16 of 4 members on 3"
    assert "random generators of members 0, 1, 2, 3: not taken" in told
    outer = next(text for text in told if text.startswith("outer state"))
    assert (
        outer == "outer state momentum_buffer of SGD(lr=0.7, momentum=0.9, nesterov=True): Average() has no use for it"
    )
    assert any(text.startswith("another method than before: ") and "outer Average()" in text for text in told)
    assert told[-1] == "data: 512 samples are behind the group, 16 more are passed over"


def test_the_same_outer_step_with_other_numbers_keeps_its_memory(four, tmp_path):
    run = tiny_run(tmp_path / "on", "diloco", {"every": 4, "outer_lr": 0.5, "momentum": 0.8}, workers=2, steps=20)
    told = told_by(run, made(four))
    assert not any(text.startswith("outer state") for text in told)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("diloco", {"every": 3}, "local steps since the last round of members 0, 1: not taken"),
        ("diloco", {"every": 4, "codec": "topk(1/4)"}, "error memories of members 0, 1: not taken"),
        ("diloco", {"every": 4, "codec": "powersgd(1)"}, "what a staged codec remembers of members 0, 1: not taken"),
        ("streaming", {"every": 4, "fragments": 2, "overlap": 1}, "rounds under way of members 0, 1: not taken"),
    ],
)
def test_every_dropped_piece_is_told(four, tmp_path, method, options, words):
    carry_out(tiny_run(tmp_path / "run", method, options))
    found = gather(tmp_path / "run", step=16)
    assert words in found.told
    assert not any(words.partition(" of ")[0] in text for text in gather(four).told)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda sync: sync["pacing"]["pace"].update(local={"0": 3}), "the pace that a pacer decided"),
        (lambda sync: sync["fragments"][0].update(own={"m": torch.ones(2)}), "the outer step's own memory"),
        (lambda sync: sync["fragments"][0].update(owed=torch.ones(2)), "what is owed of rounds without effect"),
        (lambda sync: sync["fragments"][0]["carried"].update(shared={"h": torch.ones(2)}), "feedback's common memory"),
        (lambda sync: sync["fragments"][0]["carried"].update(dropped={"0": torch.ones(2)}), "memories of the second"),
    ],
)
def test_what_is_rarely_there_is_told_too(four, tmp_path, change, words):
    for rank in range(4):
        state = checkpoint.load(four, 16, rank)
        if rank == 2:
            change(state["sync"])
        checkpoint.save(tmp_path, 16, rank, state)
    told = [text for text in gather(tmp_path).told if text.startswith(words)]
    assert [text.endswith(" of members 2: not taken") for text in told] == [True]
    assert not any(text.startswith(words) for text in gather(four).told)


def test_outer_state_of_no_parameter_is_told(four, tmp_path):
    for rank in range(4):
        state = checkpoint.load(four, 16, rank)
        state["sync"]["fragments"][0]["memory"] |= {"odd": torch.ones(5), "moved": torch.tensor(3.0)}
        checkpoint.save(tmp_path, 16, rank, state)
    found = gather(tmp_path)
    assert "outer state odd: not of single parameters that all have alike; not taken" in found.told
    assert {float(record.outer["moved"]) for record in found.records.values()} == {3.0}


def test_members_left_out_are_told(four):
    assert "members 1: not taken, as asked" in gather(four, ranks=[0, 2, 3]).told


# ---- data


@pytest.mark.parametrize(("position", "samples", "batches"), [(0, 8, 0), (64, 32, 2), (65, 32, 3), (512, 24, 22)])
def test_no_sample_that_is_behind_is_drawn_again(position, samples, batches):
    assert adopting.batches_behind(position, samples) == batches
    assert (batches - 1) * samples < position <= batches * samples or position == batches == 0


def test_the_data_position_goes_along_twice(four, tmp_path):
    drawn: list[tuple[int, int]] = []
    task = TinyTask(fail=lambda step, rank: drawn.append((step, rank)))
    carry_out(tiny_run(tmp_path / "three", workers=3, steps=24, checkpoint_every=20), start=made(four), task=task)
    assert {step for step, _ in drawn} == {0, *range(22, 30)}  # 0: how large is a batch?
    found = gather(tmp_path / "three", step=20)
    assert found.position == (22 + 4) * 3 * 8


# ---- the members that go on


def test_rounds_and_samples_are_counted_from_the_checkpoint_on(four):
    plan = MethodOptions("diloco", {"every": 4, "pace": "by_speed"}).build()
    state, _ = adopting.method_state({"samples": 5}, TinyTask().model(), plan, gather(four))
    assert (state["step"], state["made"], state["counted"]) == (16, 16, [[16, 5]])
    assert state["pacing"]["since"] == 16  # else a paced round would be due at once


def each_from(run, starts: list[Path | None]) -> None:
    def member(link: Link) -> None:
        train(run, TinyTask(), link, display=Silent(), stops=lambda: False, start=starts[link.rank])

    simulate(len(starts), member, Network(20e6, 20e6, 0.04, step_s=0.05))


def test_all_members_go_on_from_the_same(four, tmp_path):
    run = tiny_run(tmp_path / "on", workers=2, steps=20)
    with pytest.raises(ConfigError, match="--from"):
        each_from(run, [made(four), made(four, inner="copy")])
    with pytest.raises(ConfigError, match="from"):
        each_from(run, [made(four), None])


# ---- the file


def test_what_was_written_is_read(four, tmp_path):
    before = gather(four)
    whole = universal.write(tmp_path / "a.safetensors", before)
    found = universal.read(tmp_path / "a.safetensors")
    assert found.digest == whole
    assert len(whole) == 32
    for name in ("step", "members", "answers", "outer", "optimizer", "position", "rounds", "config", "told"):
        assert getattr(found, name) == getattr(before, name)
    assert list(found.records) == list(before.records)
    for name, record in before.records.items():
        again = found.records[name]
        assert torch.equal(again.value, record.value)
        assert again.role == record.role
        assert again.rounds == record.rounds
        assert all(torch.equal(again.outer[key], value) for key, value in record.outer.items())
        assert all(torch.equal(again.inner[key], value) for key, value in record.inner.items())


def test_tied_frozen_and_counting_parts_have_their_roles():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    found = universal.roles(model)
    assert found["0.weight"] == "trained"
    assert found["2.weight"] == "=0.weight"
    assert found["2.bias"] == "frozen"
    assert found["1.running_mean"] == found["1.num_batches_tracked"] == "buffer"


class Tied(Dry):
    """Two layers of one matrix, running statistics, and a bias that is not trained."""

    def model(self) -> nn.Module:
        first, last = nn.Linear(small.WIDTH, small.WIDTH), nn.Linear(small.WIDTH, small.WIDTH)
        last.weight = first.weight
        last.bias.requires_grad_(False)
        return nn.Sequential(first, nn.BatchNorm1d(small.WIDTH), last, nn.Linear(small.WIDTH, small.CLASSES))


def test_buffers_and_tied_parameters_go_along(tmp_path):
    carry_out(tiny_run(tmp_path / "run"), task=Tied())
    start = made(tmp_path / "run", step=16)
    found = universal.read(start)
    states = [checkpoint.load(tmp_path / "run", 16, rank)["model"] for rank in range(2)]
    assert found.aliases == {"2.weight": "0.weight"}
    assert "2.weight" not in found.records
    mean = torch.stack([state["1.running_mean"] for state in states]).mean(dim=0)
    assert torch.equal(found.records["1.running_mean"].value, mean)
    assert int(found.records["1.num_batches_tracked"].value) == 16
    carry_out(tiny_run(tmp_path / "on", "diloco", {"every": 50}, workers=3, steps=18, checkpoint_every=1),
              start=start, task=Tied())  # fmt: skip
    assert torch.equal(checkpoint.load(tmp_path / "on", 17, 2)["model"]["2.bias"], states[0]["2.bias"])


@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
def test_an_interrupted_write_leaves_nothing(four, tmp_path, monkeypatch, where):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint if where == "save_file" else os, where, full)
    with pytest.raises(OSError, match="No space"):
        universal.write(tmp_path / "a.safetensors", gather(four))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_not_replaced(four, tmp_path):
    (tmp_path / "a.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match=r"a\.safetensors is there already"):
        universal.write(tmp_path / "a.safetensors", gather(four))
    assert (tmp_path / "a.safetensors").read_text() == "mine"


# ---- refusals


def changed(path: Path, out: Path, tensors=lambda found: found, metadata=lambda found: found) -> Path:
    with safe_open(path, framework="pt") as file:
        noted = dict(file.metadata())
    save_file(tensors(load_file(path)), out, metadata(noted))
    return out


@pytest.mark.parametrize("key", ["0.bias/value", "0.bias/outer/momentum_buffer", "0.bias/inner/exp_avg"])
def test_a_damaged_record_is_named(four, tmp_path, key):
    bad = changed(made(four), tmp_path / "b.safetensors", lambda found: {**found, key: found[key] + 1})
    with pytest.raises(ConfigError, match=r"b\.safetensors: record '0\.bias' does not match its digest") as caught:
        universal.read(bad)
    assert "mend" in str(caught.value)
    assert "expected" in str(caught.value)


def test_a_record_without_its_tensors_is_named(four, tmp_path):
    bad = changed(made(four), tmp_path / "b.safetensors",
                  lambda found: {key: value for key, value in found.items() if key != "3.bias/value"})  # fmt: skip
    with pytest.raises(ConfigError, match=r"record '3\.bias' lacks 3\.bias/value"):
        universal.read(bad)


@pytest.mark.parametrize("name", ["head", "records"])
def test_facts_are_under_the_digest_too(four, tmp_path, name):
    bad = changed(made(four), tmp_path / "b.safetensors",
                  metadata=lambda noted: {**noted, name: noted[name].replace("0", "1", 1)})  # fmt: skip
    with pytest.raises(ConfigError, match="its list of records does not match its digest"):
        universal.read(bad)


def test_a_newer_format_is_refused(four, tmp_path):
    bad = changed(made(four), tmp_path / "b.safetensors",
                  metadata=lambda noted: {**noted, "format": "thinwire-universal-2"})  # fmt: skip
    with pytest.raises(ConfigError, match="format thinwire-universal-2, which is newer than this thinwire"):
        universal.read(bad)
    assert universal.is_universal(bad)


def test_other_files_are_refused(four, tmp_path):
    with pytest.raises(ConfigError, match="one member’s part of a checkpoint"):
        universal.read(checkpoint.file_of(four, 16, 0))
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="format None"):
        universal.read(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"no such thing")
    for path in (tmp_path / "b.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(ConfigError, match="expected  an undamaged universal checkpoint"):
            universal.read(path)
        assert not universal.is_universal(path)


def without(start: Path, out: Path, change) -> Path:
    found = universal.read(start)
    universal.write(out, replace(found, records=change(dict(found.records))))
    return out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: {k: v for k, v in r.items() if k != "0.bias"}, r"another model: no record of '0\.bias'"),
        (lambda r: {**r, "4.bias": r["0.bias"]}, r"a record of '4\.bias', which this model does not have"),
        (lambda r: {**r, "0.bias": replace(r["0.bias"], value=torch.zeros(3))}, r"'0\.bias' is \[3\], in this model"),
    ],
)
def test_another_model_is_refused(four, tmp_path, change, words):
    bad = without(made(four), tmp_path / "b.safetensors", change)
    with pytest.raises(ConfigError, match=words):
        carry_out(tiny_run(tmp_path / "on", workers=2, steps=20), start=bad)


def test_a_run_must_have_steps_left(four, tmp_path):
    with pytest.raises(ConfigError, match=r"it is of step 16, and the run has 16(.|\n)*--steps 32"):
        carry_out(tiny_run(tmp_path / "on", workers=2, steps=16), start=made(four))


def test_seeds_and_scalars_begin_at_a_base(four, tmp_path):
    run = tiny_run(tmp_path / "on", "just_one_byte", {}, workers=2, steps=20)
    with pytest.raises(ConfigError, match="with the method just_one_byte"):
        carry_out(run, start=made(four))
    carry_out(tiny_run(tmp_path / "tuned", "just_one_byte", {}, workers=2, steps=10))
    with pytest.raises(ConfigError, match=r"a run by seeds and scalars(.|\n)*export --seeds"):
        gather(tmp_path / "tuned")


def test_a_folder_without_checkpoints(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint in"):
        gather(tmp_path)


def test_a_step_must_have_all_its_files(tmp_path):
    carry_out(tiny_run(tmp_path / "run", workers=3))
    checkpoint.file_of(tmp_path / "run", 20, 1).unlink()
    assert gather(tmp_path / "run").step == 16  # the newest that is whole
    assert gather(tmp_path / "run", ranks=[0, 2]).step == 20
    with pytest.raises(ConfigError, match=r"no whole checkpoint of step 20(.|\n)*step 20: members 0, 2"):
        gather(tmp_path / "run", step=20)
    checkpoint.file_of(tmp_path / "run", 16, 1).unlink()
    with pytest.raises(ConfigError, match="no whole checkpoint of a step with members 0, 1, 2"):
        gather(tmp_path / "run")


def test_a_checkpoint_from_before_they_had_layouts(four, tmp_path):
    state = checkpoint.load(four, 16, 0) | {"members": 1}
    del state["sync"]["layout"]
    checkpoint.save(tmp_path, 16, 0, state)
    with pytest.raises(ConfigError, match="did not note which numbers are which parameter's"):
        gather(tmp_path)


def test_an_islands_part_is_refused(four, tmp_path):
    state = checkpoint.load(four, 16, 0) | {"members": 1}
    state["sync"]["shards"] = "part 1 of 2 of an island's model"
    checkpoint.save(tmp_path, 16, 0, state)
    with pytest.raises(ConfigError, match="part 1 of 2 of an island's model"):
        gather(tmp_path)


def parted(four: Path, change) -> dict[int, dict]:
    """States of which member 2's is another one's."""
    states = {rank: checkpoint.load(four, 16, rank) for rank in range(4)}
    change(states[2])
    return states


def other_anchor(state: dict) -> None:
    state["sync"]["fragments"][0]["anchor"] += 1


def other_momentum(state: dict) -> None:
    state["sync"]["fragments"][0]["memory"]["momentum_buffer"] += 1


@pytest.mark.parametrize("change", [other_anchor, other_momentum])
def test_the_member_that_holds_another_model_is_named(four, change):
    states = parted(four, change)
    with pytest.raises(ConfigError, match=r"step-00000016/member-2\.safetensors: holds another model"):
        check_agree(four, 16, states)
    with pytest.raises(ConfigError, match=r"member-1\.safetensors, .*member-2\.safetensors: members do not agree"):
        check_agree(four, 16, {rank: states[rank] for rank in (1, 2)})
    check_agree(four, 16, {rank: states[rank] for rank in (0, 1, 3)})


def test_the_member_of_another_run_is_named(four):
    states = parted(four, lambda state: state.update(optimizer_name="SGD"))
    with pytest.raises(ConfigError, match=r"member-2\.safetensors: is of another run"):
        check_agree(four, 16, states)


def test_the_head_is_plain_json(four, tmp_path):
    with safe_open(made(four), framework="pt") as file:
        head = json.loads(file.metadata()["head"])
    assert head["step"] == 16
    assert 'name = "diloco"' in head["config"]
