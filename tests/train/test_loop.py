"""The loop: what is kept, what is told, and that a run that was stopped is the run that never was."""

import errno
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import TinyTask, Watcher, carry_out, tiny_run

import small
from thinwire.config import MethodOptions, load, loads, named_methods
from thinwire.errors import ConfigError, DivergedError, PeerLost, ThinwireError
from thinwire.links.base import Link
from thinwire.links.local import run as simulate
from thinwire.links.network import Network
from thinwire.randomness import mix
from thinwire.seeds.log import Log
from thinwire.seeds.rebuild import rebuild
from thinwire.train import checkpoint
from thinwire.train.display import Silent
from thinwire.train.loop import train
from thinwire.train.optimizer import OptimizerOptions
from thinwire.units import Duration

#: Every named method with options that fit 20 steps.
OPTIONS = {
    "ddp": {"codec": "topk(1/8)"},
    "local_sgd": {"every": 4},
    "fedavg": {"every": 4},
    "post_local_sgd": {"switch": 8, "every": 4},
    "diloco": {"every": 4, "codec": "int4"},
    "streaming": {"every": 4, "fragments": 2, "overlap": 1},
    "flasc": {"every": 4},
    "ferret": {"every": 4, "codec": "projection(50, per_block=10)"},
    "eager": {"every": 4, "fragments": 2},
    "delayed": {"every": 4},
    "co2": {"every": 4, "momentum": 0.2, "penalty": "gap"},
    "slowmo": {"every": 4},
    "muloco": {"every": 4, "codec": "feedback(layers(kmeans(4), small=16), decay=0.9)"},
    "sparse_loco": {"every": 4, "codec": "topk(1/8, block=64) | kmeans(4)"},
    "gossip": {"every": 4, "topology": "torus"},
    "late_merge": {"every": 4, "merge": 20, "topology": "pairs(0.8)"},
    "dgc": {"codec": "topk(1/8)", "warmup": 5},
    "one_bit_adam": {"freeze": 6},
    "sign_sgd": {},
    "demo": {"codec": "dct(1/8)"},
    "noloco": {"every": 4},
    "sparta": {"share": 0.1, "every": 2},
    "just_one_byte": {"samples": 2, "rule": "momentum(0.9)"},
}


def told(record):
    """The curve but for its clock and bytes: meeting again after a resume takes both."""
    return [(p.step, p.train_loss, p.valid_loss, p.accuracy) for p in record.curve[1:]]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_method_has_options_here():
    assert set(OPTIONS) == set(named_methods())


@pytest.mark.parametrize("method", OPTIONS)
def test_stopped_and_resumed_is_the_run_that_never_stopped(tmp_path, method):
    whole = carry_out(tiny_run(tmp_path / "whole", method, OPTIONS[method]))
    run = tiny_run(tmp_path / "parts", method, OPTIONS[method])
    display = Watcher()
    assert carry_out(run, stop_at_call=4, display=display) is None
    assert display.stopped_at is not None
    assert 0 < display.stopped_at < run.steps
    resumed = carry_out(run, resume=True)
    assert resumed.digest == whole.digest
    assert told(resumed) == told(whole)
    assert (resumed.final, resumed.rounds_committed) == (whole.final, whole.rounds_committed)
    assert [member.samples for member in resumed.members] == [member.samples for member in whole.members]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("method", ["diloco", "streaming"])
def test_a_crash_goes_on_from_the_last_checkpoint_of_all(tmp_path, method):
    """Everything dies between two checkpoints: what was told before the older one, evaluations too, is not lost."""
    whole = carry_out(tiny_run(tmp_path / "whole", method, OPTIONS[method]))
    run = tiny_run(tmp_path / "crashed", method, OPTIONS[method])

    def crash(step, rank):
        if step == 11:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        carry_out(run, task=TinyTask(fail=crash))
    assert checkpoint.steps(Path(run.out), 0) == {8}
    resumed = carry_out(run, resume=True)
    assert (resumed.digest, told(resumed)) == (whole.digest, told(whole))


def test_a_lost_member_costs_no_committed_round(tmp_path):
    run = tiny_run(tmp_path, workers=3)

    def fail(step, rank):
        if (step, rank) == (14, 1):
            raise RuntimeError("a disk burns")

    with pytest.raises(RuntimeError, match="a disk burns"):
        carry_out(run, task=TinyTask(fail=fail))
    assert [checkpoint.steps(tmp_path, rank) for rank in range(3)] == [{8, 16}, {8}, {8, 16}]
    saved = [checkpoint.load(tmp_path, 16, rank)["sync"] for rank in (0, 2)]
    assert [state["committed"] for state in saved] == [3, 3]  # after steps 4, 8 and 12; that of 16 was under way
    record = carry_out(run, resume=True)
    assert record.rounds_committed == 4  # what that of 16 carried is still in the parameters, and went with that of 20
    assert {member.rounds for member in record.members} == {record.rounds_committed}
    assert [p.step for p in record.curve if p.valid_loss is not None] == [0, 5, 10, 15, 20]


def test_one_member_alone_is_plain_training(tmp_path):
    """ddp of one member is the loop everybody writes, to the bit."""
    run = tiny_run(tmp_path, "ddp", {}, workers=1, steps=6, optimizer=OptimizerOptions("SGD", lr=0.1, clip_norm=0.5))
    carry_out(run)
    task = TinyTask()
    torch.manual_seed(run.seed)
    model = task.model()
    torch.manual_seed(mix(run.seed, 0) >> 1)  # the members' own draws: dropout
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        task.loss(model, task.batch(step, 0, 1)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_accumulation_is_one_larger_batch(tmp_path):
    """Two batches of one step: twice the samples, and the mean of their gradients."""
    plain = carry_out(tiny_run(tmp_path / "a", steps=4))
    double = carry_out(tiny_run(tmp_path / "b", steps=4, optimizer=OptimizerOptions(lr=1e-2, accumulate=2)))
    assert [m.samples for m in plain.members] == [4 * small.BATCH] * 2
    assert [m.samples for m in double.members] == [8 * small.BATCH] * 2
    assert plain.digest != double.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"seed": 1},
        {"optimizer": OptimizerOptions(lr=1e-2, clip_norm=0.05)},
        {"optimizer": OptimizerOptions(lr=1e-2, clip_norm=0.0)},
        {"optimizer": OptimizerOptions(lr=1e-2, schedule="cosine")},
        {"optimizer": OptimizerOptions(lr=1e-2, warmup_steps=5)},
        {"optimizer": OptimizerOptions("SGD", lr=1e-2)},
        {"optimizer": OptimizerOptions("Muon", lr=1e-2)},
        {"optimizer": OptimizerOptions("LAMB", lr=1e-2)},
        {"optimizer": OptimizerOptions("LARS", lr=1.0)},
        {"method": MethodOptions("diloco", {"every": 4, "outer_lr": 0.5})},
    ],
    ids=str,
)
def test_every_setting_changes_the_result(tmp_path, changes):
    base = {"optimizer": OptimizerOptions(lr=1e-2, clip_norm=0.5)}
    plain = carry_out(tiny_run(tmp_path / "plain", steps=8, **base))
    changed = carry_out(tiny_run(tmp_path / "changed", steps=8, **base | changes))
    assert changed.digest != plain.digest


def test_what_only_watches_does_not_change_the_result(tmp_path):
    plain = carry_out(tiny_run(tmp_path / "plain"))
    rare = carry_out(tiny_run(tmp_path / "rare", eval_every=0, checkpoint_every=0))
    assert rare.digest == plain.digest
    assert [p.step for p in rare.curve if p.valid_loss is not None] == [0, 20]
    assert checkpoint.steps(tmp_path / "rare", 0) == {20}
    assert checkpoint.steps(tmp_path / "plain", 0) == {16, 20}


def test_time_is_up_for_all_at_once(tmp_path):
    record = carry_out(tiny_run(tmp_path, steps=1000, max_time=Duration(1.0), eval_every=10))
    assert 20 <= record.steps < 100  # a step is 0.05 s; the others learn of it a call or two later
    assert {member.samples for member in record.members} == {record.steps * small.BATCH}
    assert (tmp_path / "model.safetensors").exists()


def test_the_weights_give_the_recorded_loss(tmp_path):
    record = carry_out(tiny_run(tmp_path))
    model = TinyTask().model()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert TinyTask().evaluate(model) == record.final
    assert record.curve[-1].valid_loss == record.final["loss"]
    assert loads(record.config) == tiny_run(tmp_path)


def test_steps_that_reach_nobody_are_told(tmp_path):
    display = Watcher()
    record = carry_out(tiny_run(tmp_path / "a", steps=10), display=display)
    text = "the last round is due at step 8: what is learnt in steps 9 to 10 does not reach the common model"
    assert [event.text for event in display.events] == [text]
    assert [event.text for event in record.events] == [text]
    record = carry_out(tiny_run(tmp_path / "b", steps=3))
    assert [event.text for event in record.events] == [
        "no round is due before the end: what is learnt in steps 1 to 3 does not reach the common model"
    ]
    assert record.rounds_committed == 0
    assert carry_out(tiny_run(tmp_path / "c", steps=8)).events == ()


def test_a_run_that_diverges_says_so(tmp_path):
    with pytest.raises(DivergedError, match="no member had finite values to contribute") as caught:
        carry_out(tiny_run(tmp_path, optimizer=OptimizerOptions("SGD", lr=1e38, clip_norm=0.0)))
    assert caught.value.mend == "resume from the last checkpoint with a lower learning rate or with clipping"


# ---- members that were told different things


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"eval_every": 7}, "eval_every"),
        ({"steps": 16}, "steps"),
        ({"optimizer": OptimizerOptions(lr=2e-2)}, "optimizer.lr"),
    ],
)
def test_members_with_other_settings_refuse_each_other(tmp_path, change, name):
    errors = {}

    def member(link: Link):
        run = tiny_run(tmp_path / str(link.rank), **(change if link.rank else {}))
        try:
            train(run, TinyTask(), link, display=Silent(), stops=lambda: False)
        except ConfigError as error:
            errors[link.rank] = str(error).splitlines()[0]
            raise

    with pytest.raises(ConfigError):
        simulate(2, member)
    assert set(errors) == {0, 1}
    assert len(set(errors.values())) == 1
    assert errors[0].startswith(f"members disagree on {name}: member 1 has ")


def test_a_folder_may_differ(tmp_path):
    def member(link: Link):
        run = tiny_run(tmp_path / str(link.rank), threads=1 + link.rank)
        return train(run, TinyTask(), link, display=Silent(), stops=lambda: False)

    assert simulate(2, member)[0].digest == carry_out(tiny_run(tmp_path / "one")).digest


# ---- disks


class Full:
    """A disk that is full from the `after`th file on."""

    def __init__(self, after: int) -> None:
        self.after, self.files, self.save = after, 0, checkpoint.save_file

    def __call__(self, tensors, path, metadata=None):
        self.files += 1
        self.save(tensors, path, metadata)
        if self.files > self.after:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_stops_no_run(tmp_path, monkeypatch):
    whole = carry_out(tiny_run(tmp_path / "whole"))
    monkeypatch.setattr(checkpoint, "save_file", Full(after=3))  # 2 of step 8, 1 of step 16
    display = Watcher()
    record = carry_out(tiny_run(tmp_path / "full"), display=display)
    assert record.digest == whole.digest
    failed = sorted((event.step, event.kind, event.text) for event in record.events)
    why = "[Errno 28] No space left on device"
    assert failed == [
        (16, "checkpoint failed", f"member 1 could not write its checkpoint of step 16: {why}"),
        (20, "checkpoint failed", f"member 0 could not write its checkpoint of step 20: {why}"),
        (20, "checkpoint failed", f"member 1 could not write its checkpoint of step 20: {why}"),
    ]
    assert [event.step for event in display.events] == [20]
    assert [checkpoint.steps(tmp_path / "full", rank) for rank in (0, 1)] == [{8, 16}, {8}]
    assert not [name for name in files(tmp_path / "full") if "partial" in name]


def test_a_stop_that_could_not_be_kept_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", Full(after=2))
    with pytest.raises(ThinwireError) as caught:
        carry_out(tiny_run(tmp_path, steps=500), stop_at_call=6)
    assert re.fullmatch(r"stopped after step \d+, but member [01] could not write its checkpoint", caught.value.wrong)
    assert caught.value.mend == f"make room; --resume {tmp_path} goes on from step 8"


def test_weights_that_could_not_be_kept_are_an_error(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ThinwireError) as caught:
        carry_out(tiny_run(tmp_path))
    assert caught.value.wrong.startswith(f"{tmp_path / 'model.safetensors'} could not be written: ")
    assert (
        caught.value.mend == f"make room, then end the run from its last checkpoint: thinwire train --resume {tmp_path}"
    )
    (tmp_path / "model.safetensors").rmdir()
    assert carry_out(tiny_run(tmp_path), resume=True).digest == carry_out(tiny_run(tmp_path / "whole")).digest


# ---- resuming what does not fit


@pytest.fixture
def stopped(tmp_path):
    run = tiny_run(tmp_path, steps=8)
    carry_out(run)
    return run


@pytest.mark.parametrize(
    ("change", "task", "wrong"),
    [
        ({"workers": 3}, None, "the checkpoint in {} is of 2 members, this run has 3"),
        ({"workers": 1}, None, "the checkpoint in {} is of 2 members, this run has 1"),
        ({}, TinyTask(width=8), "the checkpoint in {} is of another model: size mismatch for 0.weight: "),
        (
            {"optimizer": OptimizerOptions("SGD")},
            None,
            "the checkpoint in {} was made with the optimizer AdamW, not SGD",
        ),
        (
            {"method": MethodOptions("diloco", {"every": 2})},
            None,
            "the saved state is of another method: its schedule is Every(steps=4, overlap=0)",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(stopped, change, task, wrong):
    with pytest.raises(ConfigError) as caught:
        carry_out(replace(stopped, steps=12, **change), task=task, resume=True)
    assert caught.value.wrong.startswith(wrong.format(stopped.out))


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ConfigError) as caught:
        carry_out(tiny_run(tmp_path), resume=True)
    assert str(caught.value) == (
        f"no checkpoint in {tmp_path}\n"
        "  expected  a folder that an earlier run has written checkpoints into\n"
        "  mend      name that run's folder, or start anew without --resume"
    )


def test_a_damaged_checkpoint_is_refused_and_an_older_one_does(tmp_path):
    run = tiny_run(tmp_path)
    record = carry_out(run)
    damaged = tmp_path / "checkpoints" / "step-00000020" / "member-1.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        carry_out(run, resume=True)
    assert str(caught.value) == (
        f"{damaged}: its digest does not match: it was changed or damaged\n"
        "  expected  a checkpoint of format thinwire-member-1\n"
        "  mend      resume from an earlier step: remove this step's folder on all members"
    )
    for path in damaged.parent.iterdir():
        path.unlink()
    resumed = carry_out(run, resume=True)
    assert (resumed.digest, told(resumed)) == (record.digest, told(record))


def test_what_is_asked_for_now_holds_after_a_resume(tmp_path):
    """The optimizer's saved state comes back, not its options: those of the run do."""
    digests = set()
    for name, decay in (("kept", 0.01), ("changed", 0.5)):
        run = tiny_run(tmp_path / name, steps=8)
        carry_out(run)
        options = OptimizerOptions(lr=1e-2, options={"weight_decay": decay})
        digests.add(carry_out(replace(run, steps=12, optimizer=options), resume=True).digest)
    assert len(digests) == 2


def test_an_ended_run_may_go_on_further(tmp_path):
    whole = carry_out(tiny_run(tmp_path / "whole"))
    run = tiny_run(tmp_path / "parts", steps=12)
    carry_out(run)
    assert carry_out(replace(run, steps=20), resume=True).digest == whole.digest


@pytest.mark.parametrize("name", ["Muon", "LAMB", "LARS"])
@pytest.mark.parametrize("method", ["ddp", "diloco"])
def test_optimizers_of_matrices_resume_to_the_bit(tmp_path, name, method):
    """Two optimizers, a warm-up and a cosine in the middle; state of a library of its own."""
    options = OptimizerOptions(name, lr=1e-2, warmup_steps=3, schedule="cosine")
    method_options = {"every": 4} if method == "diloco" else {}
    whole = carry_out(tiny_run(tmp_path / "whole", method, method_options, steps=12, optimizer=options))
    run = tiny_run(tmp_path / "parts", method, method_options, steps=12, optimizer=options)
    assert carry_out(run, stop_at_call=2) is None
    assert carry_out(run, resume=True).digest == whole.digest


def test_members_take_another_ones_checkpoint_where_they_have_none(tmp_path, caplog):
    run = tiny_run(tmp_path, workers=3, steps=8)
    carry_out(run)
    (tmp_path / "checkpoints" / "step-00000008" / "member-2.safetensors").unlink()
    record = carry_out(replace(run, steps=12), resume=True)
    assert record.rounds_committed == 3
    assert "this member has no checkpoint of step 8 and goes on from member 0's" in caplog.text


def test_the_record_is_whole(tmp_path):
    record = carry_out(tiny_run(tmp_path))
    assert [member.rank for member in record.members] == [0, 1]
    assert sum(sent for sent, _ in record.bytes_by_purpose.values()) == sum(m.sent_bytes for m in record.members)
    assert {"handshake", "rounds", "roll call"} == set(record.bytes_by_purpose)
    for member in record.members:
        spent = member.compute_s + member.encode_s + member.wait_s + member.apply_s
        assert spent <= record.seconds + 0.1  # the last point is told before the last roll call
    assert asdict(record)["clock"] == "simulated"


def test_a_lost_member_is_named(tmp_path):
    """On the others' side: what they raise is caught in the member, since the simulation shows the first failure."""
    lost = {}

    def member(link: Link):
        run = tiny_run(tmp_path, workers=3)

        def fail(step, rank):
            if (step, rank) == (5, 1):
                raise RuntimeError("gone")

        try:
            train(run, TinyTask(fail=fail), link, display=Silent(), stops=lambda: False)
        except PeerLost as error:
            lost[link.rank] = error.ranks
            raise

    with pytest.raises(RuntimeError, match="gone"):
        simulate(3, member)
    assert set(lost) == {0, 2}
    assert all(1 in ranks for ranks in lost.values())


def test_the_configuration_is_read_back(tmp_path):
    from thinwire.train.launch import execute

    run = tiny_run(tmp_path, steps=4, workers=1)
    record = execute(run, display=Silent())
    assert load(tmp_path / "run.toml") == run
    assert record is not None
    assert loads(record.config) == run


def test_a_tuned_run_leaves_its_base_and_its_log(tmp_path):
    """Which give its weights: what `thinwire import` does."""
    run = tiny_run(tmp_path, "just_one_byte", {"samples": 3})
    record = carry_out(run)
    log = Log.from_bytes((tmp_path / "seeds.log").read_bytes())
    assert (len(log.rounds), log.recipe.samples, log.recipe.seed) == (run.steps, 3, run.seed)
    rebuilt = load_file(tmp_path / "base.safetensors")
    rebuild(rebuilt, log)
    tuned = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(rebuilt[name], tuned[name]) for name in tuned)
    assert record.method["outer"] == "sgd"
    assert [event.kind for event in record.events] == ["no optimizer"]
    assert record.bytes_by_purpose["scalars"][0] == run.steps * 2 * 100  # packets of two members, each to one other


def test_a_tuned_step_is_of_all_accumulated_batches(tmp_path):
    plain, twice = (
        carry_out(
            replace(
                tiny_run(tmp_path / str(count), "just_one_byte", {"samples": 1}),
                optimizer=OptimizerOptions(lr=1e-2, accumulate=count),
            )
        )
        for count in (1, 2)
    )
    assert twice.members[0].samples == 2 * plain.members[0].samples
    assert twice.digest != plain.digest


def test_a_seed_beside_the_run_s_is_refused():
    with pytest.raises(ConfigError, match="method just_one_byte has no option 'seed'"):
        MethodOptions("just_one_byte", {"seed": 4}).build()


@pytest.mark.parametrize("answer", ["topology", "pace", "aggregator"])
def test_answers_that_no_scalar_is_made_for_are_refused(answer):
    words = {"topology": "islands(2)", "pace": "by_speed", "aggregator": "median"}[answer]
    with pytest.raises(ConfigError, match=f"{answer} = .* for method just_one_byte"):
        MethodOptions("just_one_byte", {answer: words}).build()


def test_members_of_unlike_speed_keep_their_calls_and_rounds_apart(tmp_path):
    """A slow member passes several shared steps at once: a round and a call among them come in another order."""
    run = tiny_run(tmp_path, "diloco", {"every": 6, "pace": "by_speed"}, steps=60, eval_every=5, workers=2)
    record = carry_out(run, network=Network(20e6, 20e6, 0.01, step_s=[0.05, 0.14]))
    assert record.rounds_committed > 3
    assert record.members[0].samples > 2 * record.members[1].samples
    assert not [event for event in record.events if event.kind != "steps after the last round"]
