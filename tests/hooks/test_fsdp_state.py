"""The state of the FSDP hooks, on simulated members: shards, sums, memories, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hook_doubles import ScaleFirst
from torch import Tensor, nn

from doubles import Counted, Halves
from thinwire import ConfigError, PacketError, run
from thinwire.codecs import ErrorFeedback, int8, topk
from thinwire.hooks.fsdp import Shards, fsdp
from thinwire.hooks.scatter import scatters
from thinwire.hooks.session import method_of
from thinwire.links.faulty import Tampered, flip

AVG, SUM = dist.ReduceOp.AVG, dist.ReduceOp.SUM


def given(step: int, rank: int, n: int) -> Tensor:
    """Small multiples of 1/16: sums and halves of them do not round in float32."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(-64, 64, (n,), generator=generator).float() / 16


def scattered(codec, *, steps=3, m=(7, 300), op=AVG, dtype=torch.float32, spoil=(), wire=lambda link: link):
    """The shards of every step, by module, and the state, on every member."""

    def member(link):
        state = Shards(wire(link), method_of(codec), ("first", "second"), "a model")
        found = []
        for step in range(steps):
            for unit, size in enumerate(m):
                x = given(step + 50 * unit, link.rank, size * len(link.members)).to(dtype)
                if link.rank in spoil:
                    x[3] = torch.nan
                out = torch.zeros(size, dtype=dtype)
                state.reduce_scatter(unit, out, x, op)
                found.append(out)
        return found, state.state_dict(), state.meter.total().sent_bytes

    return member


def expected(step: int, unit: int, rank: int, members: int, m: int, who=None) -> Tensor:
    who = range(members) if who is None else who
    rows = [given(step + 50 * unit, each, m * members).view(members, m)[rank] for each in who]
    return sum(rows) / len(rows)


@pytest.mark.parametrize("members", [1, 2, 4])
@pytest.mark.parametrize("codec", ["fp32", Counted(16), Halves()], ids=str)
def test_every_member_gets_the_mean_of_its_own_shard(codec, members):
    for rank, (found, _, _) in enumerate(run(members, scattered(codec))):
        for at, shard in enumerate(found):
            step, unit = divmod(at, 2)
            assert torch.equal(shard, expected(step, unit, rank, members, (7, 300)[unit]))


def test_a_sum_is_a_sum():
    means, sums = run(4, scattered("fp32")), run(4, scattered("fp32", op=SUM))
    for (mean, _, _), (total, _, _) in zip(means, sums, strict=True):
        assert all(torch.equal(4 * a, b) for a, b in zip(mean, total, strict=True))


def test_narrow_gradients_are_combined_in_float32():
    for rank, (found, _, _) in enumerate(run(3, scattered("fp32", dtype=torch.bfloat16))):
        exact = expected(0, 0, rank, 3, 7)
        assert found[0].dtype == torch.bfloat16
        assert torch.equal(found[0], exact.bfloat16())


@pytest.mark.parametrize("codec", ["feedback(topk(1/8))", ErrorFeedback(ScaleFirst()), "tagc"], ids=str)
def test_nothing_is_lost(codec):
    """Sum of what was applied + mean residual == sum of mean gradients, shard by shard, within float32's rounding."""
    steps, m = 6, 300
    results = run(2, scattered(codec, steps=steps, m=(m,)))
    owed = sum(saved["states"][0]["carried"]["own"]["residual"] for _, saved, _ in results) / 2
    for rank, (found, _, _) in enumerate(results):
        total = sum(expected(step, 0, rank, 2, m) for step in range(steps))
        assert torch.allclose(sum(found) + owed.view(2, m)[rank], total, rtol=0, atol=1e-4)
        assert not torch.allclose(sum(found), total, rtol=0, atol=1e-3)


def test_half_of_what_an_all_reduce_sends():
    """One exchange of shards instead of two, and no verdict."""
    shards, whole = (run(4, scattered(codec, m=(4096,)))[0][2] for codec in (int8(), ErrorFeedback(Halves())))
    assert shards < 0.3 * whole, "a quarter of the bits, half of the exchanges, and headers"


def test_a_member_without_finite_values_is_left_out(caplog):
    for codec in ("fp32", Counted(16), Halves(), "feedback(topk(1))"):
        for rank, (found, _, _) in enumerate(run(3, scattered(codec, steps=1, spoil={1}))):
            assert torch.equal(found[0], expected(0, 0, rank, 3, 7, who=(0, 2)))
    assert "round 0 of module first: member 1 had no finite gradients and was left out" in caplog.text


def test_if_nobody_has_finite_values_the_result_is_nan():
    for codec in ("fp32", Counted(16), Halves(), "topk(1/8)"):
        for found, saved, _ in run(2, scattered(codec, steps=1, spoil={0, 1})):
            assert found[0].isnan().all()
            assert not saved["states"][0]["carried"]["own"]


def test_a_damaged_packet_is_an_error_that_names_its_sender():
    def wire(link):
        return Tampered(link, lambda purpose, sender, n, buffer: flip(buffer) if purpose == "rounds" else buffer)

    with pytest.raises(PacketError, match=r"round 0, fragment 0: member \d: the checksum does not match"):
        run(2, scattered("int8", wire=wire))


@pytest.mark.parametrize("codec", ["feedback(topk(1/8))", ErrorFeedback(ScaleFirst())], ids=str)
def test_a_shard_is_combined_between_islands_with_all_that_a_round_has(codec):
    """The all-reduce hook: members end with the same bits, nothing is lost, and a state resumes to the bit."""

    def member(link):
        state = Shards(link, method_of(codec), ("only",), "a model")
        applied, saved = [], None
        for step in range(6):
            if step == 3:
                saved = state.state_dict()
                state = Shards(link, method_of(codec), ("only",), "a model")
                state.load_state_dict(saved)
            x = given(step, link.rank, 200).view(20, 10)
            state.all_reduce(0, x)
            applied.append(x)
        return applied, state.state_dict()["states"][0]["carried"]["own"]["residual"]

    def straight(link):
        state = Shards(link, method_of(codec), ("only",), "a model")
        found = [given(step, link.rank, 200).view(20, 10) for step in range(6)]
        for x in found:
            state.all_reduce(0, x)
        return found

    results, others = run(2, member), run(2, straight)
    for (applied, _), whole in zip(results, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(applied, whole, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(applied, results[0][0], strict=True))
    owed = (results[0][1] + results[1][1]) / 2
    total = sum(given(step, rank, 200) for step in range(6) for rank in range(2)) / 2
    assert torch.allclose(sum(results[0][0]).view(-1) + owed, total, rtol=0, atol=1e-4)


def test_other_sizes_are_fine_without_a_memory_and_refused_with_one():
    def member(link, codec):
        state = Shards(link, method_of(codec), ("only",), "a model")
        for m in (8, 5):
            state.reduce_scatter(0, torch.zeros(m), given(0, link.rank, 2 * m), AVG)

    run(2, lambda link: member(link, "int8"))
    with pytest.raises(ConfigError, match=r"module only now has 10 .* had 16\n.*\n.*reduce_scatter_unused_params"):
        run(2, lambda link: member(link, "topk(1/2)"))


def test_what_takes_one_exchange_of_shards():
    assert scatters(int8())
    assert scatters(ErrorFeedback(topk(1 / 2)))
    assert not scatters(ScaleFirst())
    assert not scatters(ErrorFeedback(ScaleFirst()))


def test_requests_that_cannot_be_met():
    def member(link):
        state = Shards(link, method_of("int8"), ("only",), "a model")
        with pytest.raises(ConfigError, match=r"reduction .*MAX\n.*mean or the sum.*\n.*set_gradient_divide_factor"):
            state.reduce_scatter(0, torch.zeros(2), torch.zeros(2), dist.ReduceOp.MAX)
        with pytest.raises(ConfigError, match=r"module only is sharded in 4 parts\n.*1, as.*\n.*one mesh"):
            state.reduce_scatter(0, torch.zeros(2), torch.zeros(8), AVG)
        with pytest.raises(ConfigError, match=r"sharded at only\n.*sharded at other\n.*start anew"):
            Shards(link, method_of("int8"), ("other",), "a model").load_state_dict(state.state_dict())

    run(1, member)
    with pytest.raises(ConfigError, match=r"no module of this Linear is sharded\n.*\n.*fully_shard"):
        fsdp(nn.Linear(2, 2))
    for codec in ("powersgd(2)", "budget(powersgd(1), powersgd(2))", "switch(fp32, 3, powersgd(2))"):
        with pytest.raises(
            ConfigError, match=r"are slices of parameters, in which it finds no matrix\n.*\n.*hooks.ddp"
        ):
            fsdp(nn.Linear(2, 2), codec)


@pytest.mark.parametrize(("across", "setter"), [(None, "set_custom_reduce_scatter"), ("group", "set_all_reduce_hook")])
def test_an_older_pytorch_is_told_what_it_lacks(monkeypatch, across, setter):
    from torch.distributed.fsdp import FSDPModule

    monkeypatch.delattr(FSDPModule, setter)
    with pytest.raises(ConfigError, match=rf"has no FSDPModule.{setter}\n.*\n.*pip install -U torch"):
        fsdp(nn.Linear(2, 2), across=across)
