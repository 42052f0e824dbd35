"""The state of the DDP hook, on simulated members that hand it buckets of any shape and order."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from hook_doubles import Bucket, ScaleFirst
from torch import Tensor, nn

from thinwire import ConfigError, DivergedError, LinkError, Network, PeerLost, run
from thinwire.codecs import ErrorFeedback, int4, topk
from thinwire.hooks.ddp import Gradients, ddp, deal, on_bucket, trained
from thinwire.hooks.session import _InOrder, method_of
from thinwire.links.faulty import Tampered, flip
from thinwire.randomness import mix

SHAPES = {"a.weight": (8, 6), "a.bias": (8,), "b.weight": (5, 8), "b.bias": (5,), "c": (300,), "d": (1,)}
MOST_BYTES = 160  # three units


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in SHAPES.items()}


def gradients(step: int, rank: int) -> dict[str, Tensor]:
    """Small multiples of 1/16: sums and halves of them do not round in float32."""
    drawn = random.Random(mix(step, rank))
    return {
        name: torch.tensor([drawn.randint(-64, 64) / 16 for _ in range(torch.Size(shape).numel())]).view(shape)
        for name, shape in SHAPES.items()
    }


def layout(seed: int) -> list[list[str]]:
    """The parameters in buckets as DDP might have them: any order, any sizes."""
    drawn = random.Random(seed)
    names = drawn.sample(list(SHAPES), len(SHAPES))
    cuts = sorted(drawn.sample(range(1, len(names)), drawn.randint(0, 4)))
    return [names[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]


def hand_out(state: Gradients, named: dict[str, nn.Parameter], given: dict[str, Tensor], buckets: list[list[str]]):
    """A backward pass: every bucket to the hook, then DDP's wait for all futures. name -> the mean as DDP reads it."""
    futures, made = [], []
    for index, names in enumerate(buckets):
        bucket = Bucket(
            index, index == len(buckets) - 1, [named[name] for name in names], [given[name] for name in names]
        )
        futures.append(on_bucket(state, bucket))
        made.append(bucket)
    found = {}
    for names, bucket, future in zip(buckets, made, futures, strict=True):
        assert future.wait().data_ptr() == bucket.buffer().data_ptr()
        found |= dict(zip(names, bucket.gradients(), strict=True))
    return found


def make(link, codec, named=None, **options) -> Gradients:
    return Gradients(link, method_of(codec), named or parameters(), most_bytes=MOST_BYTES, **options)


def training(codec, *, steps: int = 6, layouts=lambda step: layout(step), **options):
    """Every step's means by name, and the state at the end, on every member."""

    def member(link):
        named = parameters()
        state = make(link, codec, named, **options)
        means = [hand_out(state, named, gradients(step, link.rank), layouts(step)) for step in range(steps)]
        return means, state.state_dict()

    return member


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def residual(saved: dict, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """What a saved state still owes, by parameter."""
    found = {}
    for names, state in zip(saved["units"], saved["states"], strict=True):
        pieces = state["carried"]["own"]["residual"].split([named[name].numel() for name in names])
        found |= {name: piece.view(named[name].shape) for name, piece in zip(names, pieces, strict=True)}
    return found


def test_units_hold_every_parameter_once_last_first():
    units = deal(parameters(), MOST_BYTES)
    assert [name for unit in units for name in unit] == list(reversed(SHAPES))
    assert len(units) == 3
    assert deal(parameters(), 1 << 30) == (tuple(reversed(SHAPES)),)
    big = {"x": nn.Parameter(torch.zeros(1 << 18)), "y": nn.Parameter(torch.zeros(3)), "z": nn.Parameter(torch.ones(1))}
    assert deal(dict(reversed(big.items())), 25 << 20) == (("x",), ("y", "z")), "the first unit is small"


@pytest.mark.parametrize("members", [1, 2, 4])
def test_every_bucket_comes_back_as_the_members_mean(members):
    for means, _ in run(members, training("fp32")):
        for step, mean in enumerate(means):
            given = [gradients(step, rank) for rank in range(members)]
            expected = {name: sum(each[name] for each in given) / members for name in SHAPES}
            assert equal(mean, expected)


@pytest.mark.parametrize(
    "codec",
    [
        "int8",
        int4(rounding="stochastic"),
        "feedback(topk(1/8) | int4)",
        ScaleFirst(),
        ErrorFeedback(ScaleFirst()),
        "powersgd(1)",
        "tagc",
        "budget(topk(1/8), topk(1/4), window=1, refresh=2, small=4)",
        "ef21(topk(1/4))",
    ],
    ids=str,
)
def test_buckets_mean_nothing(codec):
    """Other buckets in every step, or one for all: the same bits, and members agree on them."""
    changing, one = run(3, training(codec)), run(3, training(codec, layouts=lambda step: [list(SHAPES)]))
    for (means, _), (others, _) in zip(changing, one, strict=True):
        assert all(equal(a, b) for a, b in zip(means, others, strict=True))
        assert all(equal(a, b) for a, b in zip(means, changing[0][0], strict=True))


def test_what_was_dropped_survives_other_buckets():
    """Sum of what was applied + mean residual == sum of mean gradients; exact, since halves of 1/16 do not round."""
    steps = 7
    results = run(2, training("feedback(topk(1/4))", steps=steps))
    named = parameters()
    owed = [residual(saved, named) for _, saved in results]
    for name in SHAPES:
        applied = sum(mean[name] for mean in results[0][0])
        given = sum(gradients(step, rank)[name] for step in range(steps) for rank in range(2))
        assert torch.equal(applied + (owed[0][name] + owed[1][name]) / 2, given / 2)
        assert not torch.equal(applied, given / 2) or name == "d", "the codec dropped nothing"


def test_what_needs_feedback_gets_it():
    assert method_of("topk(1/4)").codec == ErrorFeedback(topk(1 / 4))


def test_the_seed_changes_what_is_drawn():
    codec = int4(rounding="stochastic")
    first, second = run(2, training(codec)), run(2, training(codec, seed=1))
    assert not equal(first[0][0][0], second[0][0][0])


def test_narrow_gradients_are_combined_in_float32_and_rounded_once():
    def member(link):
        named = parameters(torch.bfloat16)
        given = {name: value.bfloat16() / 3 for name, value in gradients(0, link.rank).items()}
        return given, hand_out(make(link, "fp32", named), named, given, layout(0))

    results = run(3, member)
    for name in SHAPES:
        total = sum(given[name].float() for given, _ in results)
        for _, mean in results:
            assert torch.equal(mean[name], (total / 3).bfloat16())


# --- values that are not finite -------------------------------------------------------------------------------------


def spoiled(link, who: set[int], steps: int, codec="fp32"):
    named = parameters()
    state = make(link, codec, named)
    means = []
    for step in range(steps):
        given = gradients(step, link.rank)
        if link.rank in who:
            given["b.bias"][2] = torch.inf
        means.append(hand_out(state, named, given, layout(step)))
    return means


def test_a_member_without_finite_values_gets_the_others_mean(caplog):
    for means in run(3, lambda link: spoiled(link, {1}, 1)):
        expected = (gradients(0, 0)["b.bias"] + gradients(0, 2)["b.bias"]) / 2
        assert torch.equal(means[0]["b.bias"], expected)
        apart = (gradients(0, 0)["c"] + gradients(0, 1)["c"] + gradients(0, 2)["c"]) / 3
        assert torch.equal(means[0]["c"], apart), "other units are not concerned"
    assert "member 1 had no finite gradients and was left out" in caplog.text


def test_if_nobody_has_finite_values_all_members_have_nan(caplog):
    for means in run(2, lambda link: spoiled(link, {0, 1}, 1, "feedback(topk(1/4))")):
        assert means[0]["b.bias"].isnan().all()
        assert means[0]["c"].isfinite().all()
    assert "the gradients are NaN on all members" in caplog.text


def test_patience_ends_in_an_error_that_names_the_member():
    with pytest.raises(DivergedError, match=r"member 1 had no finite gradients 40 times in a row\n.*\n.*learning rate"):
        run(2, lambda link: spoiled(link, {1}, 41))


# --- the wire ---------------------------------------------------------------------------------------------------------


def damaged(link, times: int):
    def change(purpose, sender, count, buffer):
        hit = purpose == "rounds" and sender == 1 and count in [2 * attempt for attempt in range(times)]
        return flip(buffer) if hit else buffer

    named = parameters()
    state = make(Tampered(link, change) if link.rank == 0 else link, "feedback(topk(1/4))", named)
    return hand_out(state, named, gradients(0, link.rank), [list(SHAPES)])


def test_a_damaged_packet_is_sent_again():
    hurt, whole = run(2, lambda link: damaged(link, 1)), run(2, lambda link: damaged(link, 0))
    assert all(equal(a, b) for a, b in zip(hurt, whole, strict=True))


def test_a_wire_that_damages_everything_is_an_error_that_says_so():
    with pytest.raises(LinkError, match=r"round 0 of unit 0 \(d \.\.\.\): given up after 3 attempts.*checksum"):
        run(2, lambda link: all_damaged(link))


def all_damaged(link):
    def change(purpose, sender, count, buffer):
        verdict = buffer.numel() < 110
        return buffer if purpose != "rounds" or verdict else flip(buffer, at=-9)

    named = parameters()
    state = make(Tampered(link, change), "fp32", named)
    return hand_out(state, named, gradients(0, link.rank), [list(SHAPES)])


def test_a_lost_member_is_an_error_in_the_last_bucket():
    def member(link):
        named = parameters()
        state = make(link, "int8", named)
        if link.rank == 1:
            return
        with pytest.raises(PeerLost, match="lost member 1"):
            hand_out(state, named, gradients(0, link.rank), layout(0))

    run(2, member)


def test_rounds_begin_in_order_two_at_a_time():
    """Members whose jobs take any time: nobody waits in a circle, because the earliest is under way everywhere."""

    def member(link):
        ordered, log, handles = _InOrder(link, None), [], []
        others = [rank for rank in link.members if rank != link.rank]
        for number in range(9):
            channel = ordered.open("test")

            def job(number=number, channel=channel):
                log.append(("begins", number))
                size = 1 + mix(number, 3) % 5000
                sent = dict.fromkeys(others, torch.zeros(size, dtype=torch.uint8))
                channel.exchange(sent, dict.fromkeys(others, size), "a test")
                log.append(("ends", number))
                return number

            handles.append(ordered.spawn(job, "job"))
        assert [handle.wait() for handle in handles] == list(range(9))
        return log

    for log in run(3, member, Network(up_bits_per_s=[8000, 80000, 800])):
        begun = [number for what, number in log if what == "begins"]
        assert [number for number in begun if number % 2 == 0] == [0, 2, 4, 6, 8], "each waits for the last but one"
        assert [number for number in begun if number % 2] == [1, 3, 5, 7]
        under_way, most = 0, 0
        for what, _ in log:
            under_way += 1 if what == "begins" else -1
            most = max(most, under_way)
        assert most == 2


def test_a_job_that_fails_does_not_hold_up_the_next():
    def member(link):
        ordered = _InOrder(link, None)
        handles = [ordered.spawn(lambda n=n: 1 / (n - 1), "job") for n in range(4)]
        with pytest.raises(ZeroDivisionError):
            handles[1].wait()
        return handles[3].wait()

    assert run(1, member) == [0.5]


# --- state ------------------------------------------------------------------------------------------------------------

RESUMED = [
    "feedback(topk(1/8) | int4)",
    "powersgd(1)",
    "ef21(tagc)",
    ErrorFeedback(ScaleFirst()),
    ErrorFeedback(int4(rounding="stochastic")),
]


@pytest.mark.parametrize("codec", RESUMED, ids=str)
def test_a_state_resumes_to_the_bit_whatever_the_buckets_are_then(codec):
    def member(link):
        named = parameters()
        state = make(link, codec, named)
        for step in range(3):
            hand_out(state, named, gradients(step, link.rank), layout(step))
        saved = state.state_dict()
        after = [hand_out(state, named, gradients(step, link.rank), layout(step)) for step in range(3, 6)]
        anew = parameters()
        again = Gradients(link, method_of(codec), anew, most_bytes=1 << 30)
        again.load_state_dict(saved)
        resumed = [hand_out(again, anew, gradients(step, link.rank), layout(step + 9)) for step in range(3, 6)]
        return all(equal(a, b) for a, b in zip(after, resumed, strict=True))

    assert run(3, member) == [True] * 3


def test_a_state_of_another_member_comes_without_its_memory():
    def member(link):
        named = parameters()
        state = make(link, "feedback(topk(1/8))", named)
        hand_out(state, named, gradients(0, link.rank), layout(0))
        saved = state.state_dict()
        again = make(link, "feedback(topk(1/8))", named)
        again.load_state_dict({**saved, "rank": 1 - link.rank})
        return [bool(one["carried"]["own"]) for one in again.state_dict()["states"]], len(saved["states"])

    assert all(kept == [False] * units for kept, units in run(2, member))


def test_members_that_resume_from_other_steps_are_told():
    def member(link):
        named = parameters()
        state = make(link, "int8", named)
        saved = [state.state_dict()]
        hand_out(state, named, gradients(0, link.rank), layout(0))
        saved.append(state.state_dict())
        with pytest.raises(ConfigError, match=r"members disagree on state.*\n.*\n.*checkpoint of the same step"):
            state.load_state_dict(saved[link.rank])

    run(2, member)


def test_a_state_of_another_codec_or_model_is_refused():
    def member(link):
        state = make(link, "int8")
        saved = state.state_dict()
        with pytest.raises(ConfigError, match=r"of another codec: int8\n.*codec int4\n.*start anew"):
            make(link, "int4").load_state_dict(saved)
        saved["shapes"]["c"] = [7]
        with pytest.raises(ConfigError, match=r"parameter 'c' has shape \[7\]\n.*shape \[300\]\n.*start anew"):
            state.load_state_dict(saved)

    run(1, member)


# --- requests that cannot be met ------------------------------------------------------------------------------------


def test_members_that_differ_are_told_so():
    def member(link, **options):
        with pytest.raises(ConfigError, match=r"members disagree on method.codec: member 1 has int4"):
            make(link, "int4" if link.rank == 1 else "int8")

    run(3, member)


def test_gradients_that_were_not_announced_or_do_not_come():
    def member(link):
        named = parameters()
        state = make(link, "int8", {name: p for name, p in named.items() if name != "d"})
        with pytest.raises(ConfigError, match=r"shape \(1,\).*\n.*\n.*make the hook anew"):
            hand_out(state, named, gradients(0, 0), [list(SHAPES)])
        state = make(link, "int8", named)
        with pytest.raises(ConfigError, match=r"no gradient of parameter 'c'\n.*\n.*make the hook anew"):
            hand_out(state, named, gradients(0, 0), [[name for name in SHAPES if name != "c"]])
        given = Bucket(0, True, list(named.values()), list(gradients(0, 0).values()))
        given._gradients[2] = given._gradients[2].to_sparse()
        with pytest.raises(ConfigError, match=r"parameter 'b.weight' is sparse\n.*dense.*\n.*sparse=False"):
            on_bucket(state, given)

    run(1, member)


def test_models_that_no_round_can_carry():
    with pytest.raises(ConfigError, match=r"no trainable parameter\n.*\n.*unfreeze"):
        trained(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ConfigError, match=r"'weight' is torch.float64\n.*\n.*model.float\(\)"):
        trained(nn.Linear(2, 2).double())
    with pytest.raises(ConfigError, match=r"given a Linear\n.*\n.*DistributedDataParallel\(model\)"):
        ddp(nn.Linear(2, 2), "int8")


def test_tied_parameters_are_one_and_ignored_ones_none():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(trained(model, ["1.bias"])) == ["0.weight", "0.bias"]


LAZY = """
import sys, thinwire
assert "torch" not in sys.modules, "import thinwire is light"
assert callable(thinwire.hooks.ddp) and callable(thinwire.hooks.fsdp)
assert "torch.distributed.fsdp" not in sys.modules, "FSDP takes a while to load, and is not asked for"
"""


def test_the_room_is_there_when_it_is_asked_for():
    subprocess.run([sys.executable, "-c", LAZY], check=True)
