"""What the mathematics of each method demands, as equalities: exact where it is exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import thinwire
from small import BATCH, adamw, batch, local_steps, loss_of, make_model, same, sgd, train
from thinwire import (
    Network,
    co2,
    delayed,
    demo,
    dgc,
    diloco,
    eager,
    every_step,
    fedavg,
    ferret,
    flasc,
    gossip,
    late_merge,
    local_sgd,
    muloco,
    noloco,
    one_bit_adam,
    post_local_sgd,
    sign_sgd,
    slowmo,
    sparse_loco,
    sparta,
    streaming_diloco,
)
from thinwire.aggregators import Median, TrimmedMean, WeightedMean
from thinwire.codecs import (
    ErrorFeedback,
    dct,
    fetchsgd,
    fp32,
    int4,
    int8,
    kmeans,
    layers,
    powersgd,
    projection,
    randk,
    rows,
    sketch,
    tagc,
    topk,
    zstd,
)
from thinwire.links.local import alone, run
from thinwire.method import Method, Phases
from thinwire.outer import SGD, Adam, Average, Mix, Nesterov, Rebase, Restart, Scheduled, per_group
from thinwire.payloads import Delta, Parameters
from thinwire.schedules import Every
from thinwire.topologies import Everyone, Exponential, Islands, RandomGraph, RandomPairs, Ring, Window

#: Methods of every kind of part; each must pass every test of this list.
METHODS = {
    "ddp": every_step(),
    "ddp int8": every_step(codec=int8()),
    "dgc": dgc(codec=topk(1 / 64), warmup=5),
    "one bit adam": one_bit_adam(freeze=3),
    "sign sgd": sign_sgd(),
    "ddp topk": every_step(codec=topk(1 / 4)),
    "ddp sketch": every_step(codec=sketch(width=200)),
    "powersgd": every_step(codec=powersgd(1)),
    "fetchsgd": every_step(codec=fetchsgd(1 / 20, width=200)),
    "diloco tagc": diloco(every=3, codec=tagc(0.3)),
    "local sgd": local_sgd(every=3),
    "local sgd bf16": local_sgd(every=3, codec=thinwire.codecs.bf16),
    "fedavg": fedavg(every=3),
    "post-local": post_local_sgd(switch=4, every=3),
    "diloco": diloco(every=3),
    "diloco adam": diloco(every=3).but(outer=Adam()),
    "diloco topk int8 zstd": diloco(every=3, codec=topk(1 / 4) | int8() | zstd()),
    "diloco int4 stochastic": diloco(every=3, codec=int4(rounding="stochastic")),
    "diloco feedback int4": diloco(every=3, codec=ErrorFeedback(int4())),
    "streaming": streaming_diloco(every=4, fragments=2, overlap=1),
    "streaming deep": streaming_diloco(every=6, fragments=3, overlap=4, codec=int8()),
    "streaming rebase": streaming_diloco(every=4, fragments=2, overlap=2).but(outer=Rebase(Nesterov(0.4, 0.9))),
    "delayed": delayed(every=3),
    "delayed fragments": delayed(every=4, fragments=2, outer_lr=0.5, momentum=0.3, codec=topk(1 / 4)),
    "eager": eager(every=3),
    "eager fragments": eager(every=4, fragments=2, codec=topk(1 / 4)),
    "eager islands": eager(every=3, codec=int4()).but(topology=Islands(2)),
    "co2": co2(every=3, momentum=0.5, clip=0.01, penalty="gap"),
    "slowmo": slowmo(every=3),
    "groups": diloco(every=3).but(
        outer=Restart(Scheduled(per_group(("*.bias", Adam()), rest=Nesterov(0.7, 0.9)), warmup=1))
    ),
    "flasc": flasc(every=3),
    "ferret": ferret(every=3, codec=projection(30, per_block=10, shrink=3)),
    "ferret shared": ferret(every=3, codec=projection(30, per_block=10, shared=True, shrink=1)),
    "noloco": noloco(every=3),
    "demo": demo(codec=dct(1 / 8)),
    "sparta": sparta(share=0.1),
    "sparta deep": sparta(share=0.2).but(schedule=Every(3, overlap=2)),
    "muloco": muloco(every=3, codec=ErrorFeedback(layers(kmeans(4), small=16), decay=0.9)),
    "sparse loco": sparse_loco(every=3, codec=topk(1 / 8, block=64) | kmeans(4)),
    "diloco powersgd": diloco(every=3, codec=powersgd(2)),
    "diloco randk": diloco(every=3, codec=randk(1 / 4)),
    "diloco rows": diloco(every=3, codec=rows(1 / 4, width=8) | int8()),
    "islands": diloco(every=3, codec=int8()).but(topology=Islands(2)),
    "islands within islands": diloco(every=3).but(topology=Islands(2, between=Islands(2))),
    "pairs": local_sgd(every=2).but(topology=RandomPairs()),
    "ring": gossip(every=2),
    "one peer": gossip(every=1, topology=Exponential()),
    "random graph in flight": Method(
        schedule=Every(4, 2), payload=Parameters(2), outer=Mix(Average(), 0.5), topology=RandomGraph(1)
    ),
    "some pairs": gossip(every=1, topology=RandomPairs(0.5)),
    "window": gossip(every=1, topology=Window(2, 3, outside=Ring())),
    "late merge": late_merge(every=2, merge=7, rounds=2),
    "median": diloco(every=3).but(aggregator=Median()),
    "trimmed": diloco(every=3, codec=int8()).but(aggregator=TrimmedMean(0.3)),
}


def of_all(method: Method | Phases, *, members: int = 3, steps: int = 8, **options):
    return run(members, lambda link: train(link, method, steps, **options))


@pytest.mark.parametrize("name", METHODS)
def test_members_agree_to_the_bit(name):
    results = of_all(METHODS[name], steps=9)
    assert all(same(results[0].consensus, other.consensus) for other in results)
    assert results[0].outcomes, "no round took place"


@pytest.mark.parametrize("name", METHODS)
def test_the_same_call_gives_the_same_bits(name):
    first, second = of_all(METHODS[name]), of_all(METHODS[name])
    assert all(same(a.live, b.live) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop", [1, 4, 5, 7])
def test_stop_and_resume_equals_never_stopped(name, stop):
    """With rounds under way too: `streaming deep` is stopped between its halves."""
    method, steps = METHODS[name], 9

    def whole(link):
        return train(link, method, steps).live

    def in_two(link):
        model, optimizer = make_model(), None
        optimizer = adamw(model)
        sync = thinwire.synchronize(model, optimizer, method, link)
        with sync:
            local_steps(model, optimizer, link.rank, range(stop))
            saved = {
                "model": _copy(model.state_dict()),
                "optimizer": _copy(optimizer.state_dict()),
                "sync": sync.state_dict(),
            }
        model = make_model()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            sync.load_state_dict(saved["sync"])
            local_steps(model, optimizer, link.rank, range(stop, steps))
        return [p.detach().clone() for p in model.parameters()]

    assert all(same(a, b) for a, b in zip(run(3, whole), run(3, in_two), strict=True))


def _copy(state):
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {name: _copy(value) for name, value in state.items()}
    return [_copy(value) for value in state] if isinstance(state, list) else state


def test_every_step_equals_one_member_on_the_concatenated_batch():
    """Tolerance: float32 sums of 24 samples in another order, over 10 steps of plain SGD."""
    members, steps = 3, 10
    together = of_all(every_step(), members=members, steps=steps, make_optimizer=sgd)[0].live
    model = make_model()
    optimizer = sgd(model)
    for step in range(steps):
        parts = [batch(step, rank) for rank in range(members)]
        x, y = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        assert len(x) == members * BATCH
        loss_of(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, alone_ in zip(together, model.parameters(), strict=True):
        assert torch.allclose(ours, alone_, rtol=1e-5, atol=1e-6)


def _dyadic_training(link, method):
    """Linear losses with dyadic gradients: no float32 operation rounds, so equal mathematics is equal bits."""
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(8).view(2, 4) / 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with thinwire.synchronize(model, optimizer, method, link):
        for step in range(4):
            slope = (torch.arange(8).view(2, 4) % (3 + step) - link.rank) / 4
            (model.weight * slope).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [model.weight.detach().clone()]


def test_diloco_with_plain_outer_sgd_is_parameter_averaging_to_the_bit():
    averaging = run(4, lambda link: _dyadic_training(link, local_sgd(every=1)))
    plain = run(4, lambda link: _dyadic_training(link, diloco(every=1, outer_lr=1.0, momentum=0.0)))
    gradients = run(4, lambda link: _dyadic_training(link, every_step()))
    assert all(same(a, b) for a, b in zip(averaging, plain, strict=True))
    assert same(averaging[0], gradients[0]), "one plain SGD step, then averaging, is averaging gradients"
    different = run(4, lambda link: _dyadic_training(link, diloco(every=1, outer_lr=0.5, momentum=0.0)))
    assert not same(averaging[0], different[0])


@pytest.mark.parametrize("keep", [None, 0.0])
def test_streaming_with_one_fragment_and_no_delay_is_diloco_to_the_bit(keep):
    streaming = streaming_diloco(every=3, fragments=1, overlap=0, outer_lr=0.7, codec=fp32)
    if keep is not None:
        streaming = streaming.but(outer=Mix(streaming.outer, keep))
    a, b = of_all(streaming), of_all(diloco(every=3))
    assert all(same(x.live, y.live) for x, y in zip(a, b, strict=True))


def test_keeping_everything_is_independent_training_though_the_anchor_moves():
    method = streaming_diloco(every=4, fragments=2, overlap=1, keep=1.0, codec=fp32)
    results = of_all(method, steps=9)
    for rank, result in enumerate(results):
        model = make_model()
        local_steps(model, adamw(model), rank, range(9))
        assert same(result.live, [p.detach() for p in model.parameters()])
    initial = of_all(method, steps=1)[0].consensus
    assert not same(initial, results[0].consensus)


def _local_training(steps: int) -> list[Tensor]:
    model = make_model()
    local_steps(model, adamw(model), 0, range(steps))
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    "method",
    [every_step(), local_sgd(every=3), fedavg(every=3), post_local_sgd(switch=4, every=3),
     local_sgd(every=2).but(topology=RandomPairs()), gossip(every=2), late_merge(every=2, merge=6)],
    ids=str,
)  # fmt: skip
def test_one_member_of_an_averaging_method_trains_locally_to_the_bit(method):
    assert same(train(alone(), method, 8).live, _local_training(8))
    assert same(of_all(method, members=1)[0].live, _local_training(8))


def test_fp32_is_no_codec_and_diloco_is_its_algorithm_box():
    """Against the paper's rule in plain torch, without any part of ours: to the bit."""
    members, every, steps = 4, 3, 9
    ours = of_all(diloco(every=every, outer_lr=0.7, momentum=0.9), members=members, steps=steps)
    models = [make_model() for _ in range(members)]
    inner = [adamw(model) for model in models]
    anchor = [p.detach().clone() for p in models[0].parameters()]
    outer = torch.optim.SGD(anchor, lr=0.7, momentum=0.9, nesterov=True)
    for first in range(0, steps, every):
        for rank in range(members):
            local_steps(models[rank], inner[rank], rank, range(first, first + every))
        for index, a in enumerate(anchor):
            deltas = [a - list(model.parameters())[index].detach() for model in models]
            a.grad = (((deltas[0] + deltas[1]) + deltas[2]) + deltas[3]) / members
        outer.step()
        for model in models:
            for p, a in zip(model.parameters(), anchor, strict=True):
                p.data.copy_(a)
    assert same(ours[2].live, anchor)


def test_flasc_is_its_algorithm_box():
    """Against the rule in plain torch: the largest of all layers together, dropped entries forgotten. To the bit."""
    members, every, steps = 4, 3, 9
    ours = of_all(flasc(every=every), members=members, steps=steps)
    models = [make_model() for _ in range(members)]
    inner = [adamw(model) for model in models]
    anchor = nn.utils.parameters_to_vector(models[0].parameters()).detach().clone()
    outer = torch.optim.Adam([anchor], lr=0.005, betas=(0.9, 0.999), eps=1e-8)
    for first in range(0, steps, every):
        deltas = []
        for rank in range(members):
            local_steps(models[rank], inner[rank], rank, range(first, first + every))
            delta = anchor - nn.utils.parameters_to_vector(models[rank].parameters()).detach()
            kept = delta.abs().topk(-(-len(delta) // 4)).indices
            deltas.append(torch.zeros_like(delta).index_copy(0, kept, delta[kept]))
        anchor.grad = (((deltas[0] + deltas[1]) + deltas[2]) + deltas[3]) / members
        outer.step()
        for model in models:
            nn.utils.vector_to_parameters(anchor.clone(), model.parameters())
    assert torch.equal(torch.cat([p.view(-1) for p in ours[2].live]), anchor)


def test_flasc_at_full_density_is_diloco_with_adam_outside():
    a = of_all(flasc(every=3, codec=topk(1)))
    b = of_all(diloco(every=3).but(outer=Adam(0.005, betas=(0.9, 0.999), eps=1e-8)))
    assert same(a[0].live, b[0].live)


def test_flasc_forgets_unless_it_is_told_to_remember():
    method = flasc(codec=topk(1 / 8) | int8())
    assert method.codec == ErrorFeedback(topk(1 / 8) | int8(), decay=0)
    assert flasc(codec=ErrorFeedback(topk(1 / 8))).codec == ErrorFeedback(topk(1 / 8))
    assert flasc(codec=int8()).codec == int8()
    remembering = of_all(flasc(every=2, codec=ErrorFeedback(topk(1 / 4))))
    assert not same(remembering[0].live, of_all(flasc(every=2))[0].live)


def test_ferret_moves_the_anchor_by_a_projection_of_what_was_done():
    """Of an orthogonal projection, |P x|^2 = <P x, x> <= |x|^2; the rest of a block that is filled up is cut off."""
    before, model = (make_model() for _ in range(2))
    local_steps(model, adamw(model), 0, range(3))
    live = of_all(ferret(every=3, codec=projection(12, per_block=12, shrink=1)), members=1, steps=3)[0].live
    x, after, projected = (
        torch.cat([p.detach().view(-1) for p in of]) for of in (before.parameters(), model.parameters(), live)
    )
    delta, moved = x - after, x - projected
    assert 0 < moved.square().sum() <= torch.dot(moved, delta) < delta.square().sum()


def test_ferret_with_a_complete_basis_is_federated_averaging():
    """Up to float32 rounding: of blocks of 64, six sums there and back, and of three rounds."""
    complete = of_all(ferret(every=3, codec=projection(4096)), steps=9)[0].live
    plain = of_all(diloco(every=3).but(outer=SGD(1.0)), steps=9)[0].live
    for a, b in zip(complete, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_ferret_forgets_unless_it_is_told_to_remember_and_a_shared_basis_is_less_to_send():
    short = projection(24, per_block=8, shrink=1)
    assert ferret(codec=short).codec == ErrorFeedback(short, decay=0)
    forgets, remembers = ferret(every=2, codec=short), ferret(every=2, codec=ErrorFeedback(short))
    assert not same(of_all(forgets)[0].live, of_all(remembers)[0].live)
    own, shared = (ferret(every=2, codec=projection(200, shared=shared)) for shared in (False, True))
    assert of_all(shared, members=4)[0].sent_bytes < of_all(own, members=4)[0].sent_bytes


def test_random_coordinates_are_added_as_they_are():
    """randk is linear: its values are all-reduced, and members send a fraction of what they would without it."""
    sent = [of_all(every_step(codec=codec), steps=4)[0].sent_bytes for codec in (randk(1 / 8), fp32)]
    assert sent[0] < sent[1]


def test_islands_of_one_are_everyone():
    """Four members: shares of 1/4 round nothing, so mean and weighted mean agree to the bit."""
    a = of_all(diloco(every=3).but(topology=Islands(1)), members=4)
    b = of_all(diloco(every=3), members=4)
    assert same(a[3].live, b[3].live)


@pytest.mark.parametrize("members", [3, 4, 5])
def test_islands_give_the_mean_of_members_not_of_islands(members):
    """Also when islands are of unequal size. Tolerance: one more rounding of each sum, over three rounds."""
    a = of_all(diloco(every=3).but(topology=Islands(2)), members=members)
    b = of_all(diloco(every=3), members=members)
    for x, y in zip(a[0].live, b[0].live, strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-5)


def test_pairs_meet_everybody_sooner_or_later():
    seen = {frozenset(RandomPairs().route(0, (0, 1, 2, 3), key).ranks) for key in range(40)}
    assert seen == {frozenset({0, other}) for other in (1, 2, 3)}
    for key in range(20):
        dealt = [RandomPairs().route(rank, (0, 1, 2, 3, 4), key).ranks for rank in range(5)]
        assert all(rank in ranks and dealt[other] == ranks for rank, ranks in enumerate(dealt) for other in ranks)


def test_fedavg_weighs_by_samples():
    """Hand-computed: members move 1 and 4 with 3 and 1 samples: (3*1 + 1*4) / 4."""

    def member(link):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            model.weight.grad = torch.tensor([[-1.0, -4.0][link.rank]]).view(1, 1)
            sync.count([3, 1][link.rank])
            optimizer.step()
        return model.weight.item()

    method = fedavg(every=1)
    assert run(2, member) == [1.75, 1.75]
    method = local_sgd(every=1)
    assert run(2, member) == [2.5, 2.5]


def test_a_lossy_codec_and_its_lossless_twin_differ():
    a, b = of_all(diloco(every=3, codec=int4())), of_all(diloco(every=3))
    assert not same(a[0].live, b[0].live)


def test_random_rounding_follows_the_seed_and_nothing_else():
    method = METHODS["diloco int4 stochastic"]
    a, b = of_all(method), of_all(method)
    assert same(a[0].live, b[0].live)

    def other_seed(link):
        model = make_model()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, method, link, seed=1):
            local_steps(model, optimizer, link.rank, range(8))
        return [p.detach() for p in model.parameters()]

    assert not same(a[0].live, run(3, other_seed)[0])


@pytest.mark.parametrize("fragments", [1, 2, 3, 5])
@pytest.mark.parametrize("every", [5, 6, 12])
@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_the_event_log_is_the_closed_form(fragments, every, overlap):
    method = Method(schedule=Every(every, overlap), payload=Delta(fragments), outer=SGD(1.0))
    steps = 30
    log = of_all(method, members=2, steps=steps, finish=False)[0].outcomes
    expected = sorted(
        (begun + overlap, f)
        for f in range(fragments)
        for begun in range(max(1, (f + 1) * every // fragments), steps + 1, every)
    )
    applied = [(event.step, event.fragment) for event in log if event.step <= steps]
    in_time = [event for event in expected if event[0] <= steps]
    assert applied[: len(in_time)] == in_time
    assert len(log) == len(expected), "rounds under way at the end are applied by leaving the block"


def test_feedback_loses_nothing_over_a_run():
    """Sum of what was applied + mean of the last residuals == sum of what members wanted to send, for outer SGD lr 1.

    Two members: one lossy hop. Tolerance: float32 sums over 8 rounds.
    """

    def member(link):
        model = nn.Linear(40, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        wanted = torch.zeros(40)
        with thinwire.synchronize(
            model, optimizer, diloco(every=1, outer_lr=1.0, momentum=0.0, codec=topk(1 / 8)), link
        ) as sync:
            for step in range(8):
                generator = torch.Generator().manual_seed(step * 10 + link.rank)
                model.weight.grad = torch.randn(1, 40, generator=generator)
                wanted += model.weight.grad.view(-1)
                optimizer.step()
            residual = sync.state_dict()["fragments"][0]["carried"]["own"]["residual"]
        return wanted, -model.weight.detach().view(-1), residual

    (wanted_0, applied, residual_0), (wanted_1, _, residual_1) = run(2, member)
    assert torch.allclose(applied + (residual_0 + residual_1) / 2, (wanted_0 + wanted_1) / 2, atol=1e-5)
    assert residual_0.abs().max() > 0


def test_overlap_hides_the_link():
    """In simulated time, exactly: with overlap the steps take as long as with an unlimited link."""
    free = Network(step_s=0.1)
    thin = Network(up_bits_per_s=200_000, down_bits_per_s=200_000, latency_s=0.02, step_s=0.1)

    def seconds(method: Method, network: Network) -> float:
        def member(link):
            model = make_model()
            optimizer = adamw(model)
            with thinwire.synchronize(model, optimizer, method, link):
                start = link.now()
                local_steps(model, optimizer, link.rank, range(15))  # the round begun at step 12 is applied at 15
                return link.now() - start

        return run(3, member, network)[0]

    overlapped = streaming_diloco(every=8, fragments=2, overlap=3)
    assert seconds(overlapped, thin) == pytest.approx(seconds(overlapped, free))
    blocking = streaming_diloco(every=8, fragments=2, overlap=0)
    assert seconds(blocking, thin) > seconds(blocking, free) + 0.2


def test_parts_that_average_parameters_need_no_outer_state():
    method = Method(
        schedule=Every(2), payload=Parameters(), outer=Average(), topology=Everyone(), aggregator=WeightedMean()
    )
    assert same(of_all(method)[0].live, of_all(fedavg(every=2))[0].live)
