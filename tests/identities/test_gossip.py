"""What the mathematics of graphs, gossip and late merges demands."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import thinwire
from small import adamw, local_steps, make_model, same, sgd, train
from thinwire import gossip, late_merge, local_sgd
from thinwire.buffers import average
from thinwire.errors import ConfigError
from thinwire.graphs import mixing_matrix
from thinwire.links.local import run
from thinwire.method import Method, Phases
from thinwire.methods.late_merge import late_budget
from thinwire.outer import Average
from thinwire.payloads import Parameters
from thinwire.routes import Group, Neighbours, members_of, shares
from thinwire.schedules import At, Every
from thinwire.topologies import (
    Everyone,
    Exponential,
    Graph,
    Islands,
    RandomGraph,
    RandomPairs,
    Ring,
    Topology,
    Torus,
    Window,
)

#: Every topology that may be gossiped over.
TOPOLOGIES: dict[str, Topology] = {
    "everyone": Everyone(),
    "ring": Ring(),
    "torus": Torus(),
    "one peer": Exponential(),
    "exponential": Exponential(one_peer=False),
    "random graph": RandomGraph(1),
    "denser random graph": RandomGraph(3),
    "pairs": RandomPairs(),
    "some pairs": RandomPairs(0.4),
    "islands": Islands(2, between=RandomPairs()),
    "window": Window(1, 1, inside=Torus(), outside=Ring()),
}
COUNTS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
#: Members 1 and 3 have three neighbours, the others two or one: a graph whose weights differ.
KITE = Graph(((0, 1), (1, 2), (2, 3), (3, 1), (3, 4)))


# --- mixing matrices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("count", COUNTS)
def test_rows_and_columns_add_up_to_one(name, count):
    """Tolerance: as many float64 roundings as there are neighbours. Columns: the mean of all models is kept."""
    for number in range(4):
        matrix = mixing_matrix(TOPOLOGIES[name], count, key=1000 + number, number=number)
        if name == "islands" and count % 2:
            continue  # an island of one weighs as its members, not as an island
        assert bool((matrix >= 0).all())
        assert torch.allclose(matrix.sum(dim=0), torch.ones(count, dtype=torch.float64), rtol=0, atol=1e-12)
        assert torch.allclose(matrix.sum(dim=1), torch.ones(count, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("count", COUNTS)
def test_whoever_is_heard_has_told(name, count):
    """Otherwise a member would wait for somebody who does not send, for ever."""
    everybody = tuple(range(count))
    for number in range(4):
        routes = [TOPOLOGIES[name].route(rank, everybody, 7, number) for rank in everybody]
        for rank, route in enumerate(routes):
            assert rank in members_of(route)
            if isinstance(route, Neighbours):
                heard = {other for other in everybody if rank in routes[other].weights} - {rank}
                assert heard == set(route.to)
                assert list(route.weights) == sorted(route.weights)


@pytest.mark.parametrize("count", COUNTS)
def test_undirected_graphs_are_symmetric(count):
    for topology in (Ring(), Torus(), RandomPairs(), *([KITE] if count == 5 else [])):
        matrix = mixing_matrix(topology, count, key=3)
        assert torch.equal(matrix, matrix.T)


def gap(matrix: Tensor) -> float:
    return 1 - torch.linalg.eigvals(matrix).abs().sort(descending=True).values[1].item()


@pytest.mark.parametrize("count", [4, 6, 9, 16, 25])
def test_the_spectral_gap_of_a_ring(count):
    """Eigenvalues of a circulant: 1/3 + 2/3 cos(2 pi k / N)."""
    assert gap(mixing_matrix(Ring(), count)) == pytest.approx(2 / 3 * (1 - math.cos(2 * math.pi / count)), abs=1e-12)


@pytest.mark.parametrize(("count", "rows", "columns"), [(9, 3, 3), (12, 3, 4), (16, 4, 4), (25, 5, 5), (18, 3, 6)])
def test_the_spectral_gap_of_a_torus(count, rows, columns):
    """(1 + 2 cos a + 2 cos b) / 5 over both circles' angles."""
    angles = [(2 * math.pi * i / rows, 2 * math.pi * j / columns) for i in range(rows) for j in range(columns)]
    values = sorted(abs(1 + 2 * math.cos(a) + 2 * math.cos(b)) / 5 for a, b in angles)
    assert gap(mixing_matrix(Torus(), count)) == pytest.approx(1 - values[-2], abs=1e-12)


@pytest.mark.parametrize("count", [4, 6, 8, 12, 16, 32])
def test_the_spectral_gap_of_an_exponential_graph(count):
    """2 / (1 + ceil(log2 N)) for even N: arXiv:2110.13363, prop. 1. Eigenvalues of a matrix that is not symmetric."""
    expected = 2 / (1 + math.ceil(math.log2(count)))
    assert gap(mixing_matrix(Exponential(one_peer=False), count)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_one_peer_averages_exactly_after_log2_rounds(count):
    """Halves of halves: no float64 operation rounds."""
    for first in (0, 1, 5):
        product = torch.eye(count, dtype=torch.float64)
        for number in range(first, first + int(math.log2(count))):
            product = mixing_matrix(Exponential(), count, number=number) @ product
        assert torch.equal(product, torch.full_like(product, 1 / count))


def test_one_peer_goes_through_all_steps_in_turn_for_any_number():
    told = [Exponential().route(0, tuple(range(6)), 0, number).to for number in range(6)]
    assert told == [(1,), (2,), (4,), (1,), (2,), (4,)]


@pytest.mark.parametrize(("degree", "count"), [(1, 8), (2, 8), (3, 9)])
def test_a_random_graph_contracts_by_its_degree(degree, count):
    """E |W x - mean|^2 / |x - mean|^2 = (N / (d+1) - 1) / (N - 1): every row is the mean of d + 1 members, and by
    symmetry under renaming E W^T W is a multiple of the identity beside the mean. Tolerance: 4 standard errors."""
    x = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x -= x.mean()
    ratios = torch.stack(
        [(mixing_matrix(RandomGraph(degree), count, key) @ x).square().sum() / x.square().sum() for key in range(800)]
    )
    expected = (count / (degree + 1) - 1) / (count - 1)
    assert ratios.mean().item() == pytest.approx(expected, abs=4 * ratios.std().item() / math.sqrt(800))
    assert not torch.equal(mixing_matrix(RandomGraph(degree), count, 1), mixing_matrix(RandomGraph(degree), count, 2))


def test_a_random_graph_of_all_others_is_everybody():
    a, b = mixing_matrix(RandomGraph(9), 5), mixing_matrix(Everyone(), 5)
    assert torch.allclose(a, b, rtol=0, atol=1e-15)


def test_weights_of_a_graph_of_ones_own():
    """By hand: 1 / (1 + the larger degree); what is left is the member's own."""
    assert KITE.route(0, (0, 1, 2, 3, 4), 0) == Neighbours((1,), {0: 0.75, 1: 0.25})
    third, own = 1 / (1 + 3), 1.0 - 2 * 1 / 4
    assert KITE.route(2, (0, 1, 2, 3, 4), 0) == Neighbours((1, 3), {1: third, 2: own, 3: third})
    assert torch.equal(mixing_matrix(KITE, 5).sum(dim=0), torch.ones(5, dtype=torch.float64))


def test_graphs_that_are_none_are_refused():
    for lines in (((0, 0),), ((0, 1), (2, 3)), ((1, 2),), ((0, 1, 2),), (0, 1)):
        with pytest.raises(
            ConfigError, match=r"a graph of the lines .*\n.*which together reach all.*\n.*write the pairs"
        ):
            Graph(lines)
    with pytest.raises(ConfigError, match=r"a graph of 5 members, and 3 are here\n.*every member\n.*or use Ring"):
        KITE.route(0, (0, 1, 2), 0)
    with pytest.raises(ConfigError, match=r"a random graph of degree 0\n.*at least 1\n.*degree=1"):
        RandomGraph(0)


def test_a_share_of_the_pairs_is_what_combines():
    """Each member is in a pair with probability `share`, four standard errors; both members of a pair say so."""
    everybody, share, rounds = tuple(range(8)), 0.3, 600
    talking = 0
    for key in range(rounds):
        routes = [RandomPairs(share).route(rank, everybody, key) for rank in everybody]
        assert all(routes[other] == route for route in routes for other in route.ranks)
        assert all(route in (Group((rank,)), RandomPairs().route(rank, everybody, key)) for rank, route in
                   enumerate(routes))  # fmt: skip
        talking += sum(len(route.ranks) == 2 for route in routes)
    pairs = rounds * 4
    assert abs(talking / 2 / pairs - share) < 4 * math.sqrt(share * (1 - share) / pairs)
    assert all(len(RandomPairs(0).route(rank, everybody, key).ranks) == 1 for rank in everybody for key in range(50))


def test_weights_of_those_who_are_absent_go_to_the_member():
    route = Neighbours((1, 2), {0: 0.5, 1: 0.25, 2: 0.25})
    assert shares(route, 0, (0, 1, 2)) == {0: 0.5, 1: 0.25, 2: 0.25}
    assert shares(route, 0, (0, 2)) == {0: 0.75, 2: 0.25}
    assert shares(route, 0, (1, 2)) == {1: 0.25, 2: 0.25}, "in proportion, if the member itself is absent"
    assert shares(Group((0, 1, 2)), 0, (0, 2)) == {0: 1.0, 2: 1.0}


# --- models ---------------------------------------------------------------------------------------------------------


def mixed(topology: Topology, members: int, rounds: int, *, fragments: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Models of dyadic numbers before and after rounds without training: no step rounds while weights are dyadic."""

    def member(link):
        model = nn.Linear(6, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        method = Method(schedule=Every(1), payload=Parameters(fragments), outer=Average(), topology=topology)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        with thinwire.synchronize(model, optimizer, method, link):
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(torch.arange(p.numel()).view_as(p) % 5 + 8 * (link.rank * 37 % 11))
            before = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
            for _ in range(rounds):
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
                optimizer.step()
        return before, torch.cat([p.detach().flatten() for p in model.parameters()])

    pairs = run(members, member)
    return [before for before, _ in pairs], [after for _, after in pairs]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_what_members_hold_after_a_round_is_the_matrix_times_what_they_held(name):
    """Tolerance: float32, of two rounds."""
    before, after = mixed(TOPOLOGIES[name], 6, 2)
    expected = torch.stack(before).double()
    key = thinwire.rounds.Terms(0, 0).key
    for number in range(2):
        expected = mixing_matrix(TOPOLOGIES[name], 6, key(number, 0), number) @ expected
    assert torch.allclose(torch.stack(after).double(), expected, rtol=1e-6, atol=0)
    assert torch.allclose(torch.stack(after).mean(dim=0), torch.stack(before).mean(dim=0), rtol=1e-6), (
        "the mean is kept"
    )


@pytest.mark.parametrize("fragments", [1, 2])
def test_one_peer_rounds_are_the_average_of_all_to_the_bit(fragments):
    """Eight members, three rounds of each fragment; dyadic numbers."""
    before, after = mixed(Exponential(), 8, 3, fragments=fragments)
    expected = torch.stack(before).sum(dim=0) / 8
    assert all(torch.equal(each, expected) for each in after)
    _, short = mixed(Exponential(), 8, 2, fragments=fragments)
    assert not all(torch.equal(each, expected) for each in short)


def test_two_members_in_a_ring_are_local_sgd_to_the_bit():
    """Weights of 1/2 round like a sum that is halved."""
    a = run(2, lambda link: train(link, gossip(every=2), 8))
    b = run(2, lambda link: train(link, local_sgd(every=2), 8))
    assert all(same(x.live, y.live) for x, y in zip(a, b, strict=True))


def test_pairs_of_two_members_at_every_step_are_data_parallel_training():
    """p = 1, N = 2, H = 1 and plain SGD. Tolerance: float32 over 10 steps."""
    a = run(2, lambda link: train(link, gossip(every=1, topology=RandomPairs(1.0)), 10, make_optimizer=sgd))
    b = run(2, lambda link: train(link, thinwire.every_step(), 10, make_optimizer=sgd))
    for x, y in zip(a[1].live, b[1].live, strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-6)


def test_no_pairs_at_all_is_local_training():
    results = run(3, lambda link: train(link, gossip(every=2, topology=RandomPairs(0)), 6))
    for rank, result in enumerate(results):
        model = make_model()
        local_steps(model, adamw(model), rank, range(6))
        assert same(result.live, [p.detach() for p in model.parameters()])
        assert [outcome.ranks for outcome in result.outcomes] == [(rank,)] * 3


def test_gossip_keeps_the_mean_of_quadratics_though_members_are_apart():
    """Equal Hessians: the mean of models is gradient descent on the mean objective. Tolerance: float32, 30 steps."""

    def member(link):
        model = nn.Linear(5, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        target = torch.arange(5.0) * (link.rank + 1)
        with thinwire.synchronize(model, optimizer, gossip(every=3), link) as sync:
            for _ in range(30):
                model.weight.grad = (model.weight.detach() - target).clone()
                optimizer.step()
            return sync.consensus()[0], sync.spread()

    mean, spread = run(5, member)[2]
    x = torch.zeros(5)
    for _ in range(30):
        x -= 0.1 * (x - torch.arange(5.0) * 3)
    assert torch.allclose(mean, x, rtol=1e-5)
    assert spread > 0.1


# --- late merges ----------------------------------------------------------------------------------------------------


def test_a_late_merge_is_the_mean_of_what_gossip_left():
    """One anchor on all members. The same to the bit: the order of rank, and four members."""
    merged = run(4, lambda link: train(link, late_merge(every=2, merge=8, topology=RandomPairs(0.5)), 8))
    before = gossip(topology=RandomPairs(0.5)).but(schedule=At((2, 4, 6)))
    left = [result.live for result in run(4, lambda link: train(link, before, 8))]
    for index, value in enumerate(merged[0].live):
        models = [each[index] for each in left]
        assert torch.equal(value, (((models[0] + models[1]) + models[2]) + models[3]) / 4)
    assert all(same(merged[0].live, other.live) for other in merged)
    assert [outcome.ranks for outcome in merged[0].outcomes][-1] == (0, 1, 2, 3)
    assert [outcome.step for outcome in merged[0].outcomes] == [2, 4, 6, 8]

    def whole(link):
        return train(link, gossip(every=2, topology=Window(3, 1, outside=RandomPairs(0.5))), 8).live

    assert all(same(window, merged[0].live) for window in run(4, whole)), "a window in the last round is the same merge"


def test_a_merge_in_several_rounds_ends_at_the_same_step():
    log = run(3, lambda link: train(link, late_merge(every=2, merge=9, rounds=2), 12))[0]
    assert [outcome.step for outcome in log.outcomes] == [2, 4, 6, 7, 9]
    assert [outcome.round for outcome in log.outcomes] == [0, 1, 2, 0, 1]
    assert [len(outcome.ranks) for outcome in log.outcomes[-2:]] == [3, 3]


@pytest.mark.parametrize("options", [{"rounds": 0}, {"merge": 1, "every": 1}, {"every": 5, "merge": 10, "rounds": 3}])
def test_merges_that_begin_before_training_are_refused(options):
    with pytest.raises(ConfigError, match=r"late_merge of .*\n.*steps before the first\n.*or in fewer rounds"):
        late_merge(**options)


@pytest.mark.parametrize("members", [2, 3, 16, 32])
@pytest.mark.parametrize("models", [2.0, 5.5, 20, 60, 1000])
def test_a_budget_is_kept_and_spent_late(members, models):
    steps, every = 1200, 20
    plan = late_budget(models, steps=steps, every=every, members=members)
    price, in_all = 2 * (members - 1) / members, steps // every
    assert plan.models == pytest.approx(plan.share * (in_all - plan.rounds) + price * plan.rounds)
    assert plan.models <= models + 1e-9
    assert 1 <= plan.rounds < in_all
    if plan.rounds > 1:
        assert plan.share == 0.2, "first enough of gossip, then more averages"
        assert plan.rounds == in_all - 1 or plan.models + price - plan.share > models, "nothing is left that buys one"
    else:
        assert plan.models > models - price or plan.share == 0.2
    method = late_merge(every=every, merge=steps, rounds=plan.rounds, topology=RandomPairs(plan.share))
    begun = [step for step in range(1, steps + 1) if method.at(step).schedule.begins(step, 1)]
    assert len(begun) == in_all
    assert sum(method.at(step).topology.consensus for step in begun) == plan.rounds


def test_budgets_by_hand():
    assert late_budget(10, steps=100, every=10, members=2, share=1.0).rounds == 9
    plan = late_budget(12, steps=400, every=10, members=4, share=0.2)  # 1.5 a merge: 7.8 + 1.5, and 2.7 left
    assert (plan.share, plan.rounds, plan.models) == (0.2, 3, pytest.approx(11.9))
    plan = late_budget(3.45, steps=400, every=10, members=4)  # 1.95 for 39 rounds
    assert (plan.share, plan.rounds) == (pytest.approx(0.05), 1)
    with pytest.raises(ConfigError, match=r"a budget of 1 models for 40 rounds of 4 members\n.*at least 1.5.*\n.*more"):
        late_budget(1, steps=400, every=10, members=4)


# --- the synchronizer -----------------------------------------------------------------------------------------------


def test_the_spread_is_its_formula_and_none_after_a_merge():
    def member(link):
        model = make_model()
        optimizer = adamw(model)
        seen = []
        with thinwire.synchronize(model, optimizer, late_merge(every=2, merge=6, topology=Ring()), link) as sync:
            assert sync.spread() == 0.0
            for step in range(6):
                local_steps(model, optimizer, link.rank, range(step, step + 1))
                live = torch.cat([p.detach().flatten() for p in model.parameters()])
                seen.append((sync.spread(), sync.has_consensus, live.clone(), sync.consensus()[0]))
        return seen

    results = run(3, member)
    for step in range(6):
        rows = torch.stack([seen[step][2] for seen in results]).double()
        expected = ((rows - rows.mean(dim=0)).square().sum() / rows.square().sum()).sqrt().item()
        for seen in results:
            assert seen[step][0] == pytest.approx(expected, rel=1e-12)
            assert seen[step][1] == (step == 5), "gossip has no consensus, nor has the phase of the merge before it"
            assert torch.allclose(seen[step][3].double(), rows.mean(dim=0), rtol=1e-6, atol=1e-7)
    assert results[0][5][0] == 0.0
    assert results[0][4][0] > 0


def test_fragments_have_consensus_when_all_of_them_have_met():
    """The second phase's fragments are averaged at steps 5 and 6; compared from their second rounds on."""
    then = Method(schedule=Every(2), payload=Parameters(2), outer=Average())

    def member(link):
        model = make_model()
        optimizer = adamw(model)
        seen = []
        with thinwire.synchronize(model, optimizer, Phases(gossip(every=2), 4, then), link) as sync:
            for step in range(9):
                local_steps(model, optimizer, link.rank, range(step, step + 1))
                seen.append(sync.has_consensus)
            return seen, sync.consensus(), sync.committed

    results = run(3, member)
    assert results[0][0] == [False] * 5 + [True] * 4
    assert all(same(results[0][1], other[1]) for other in results)
    assert results[0][2] == 2 + 5


def test_buffers_are_mixed_as_parameters_are():
    """Four in a ring, thirds by hand; whole numbers take the maximum of the neighbours'."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))
            self.register_buffer("mean", torch.zeros(2))
            self.register_buffer("steps", torch.tensor(0))

    def member(link, topology):
        model = Counting()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with thinwire.synchronize(model, optimizer, gossip(every=1, topology=topology), link):
            model.mean.fill_(9.0 * link.rank)
            model.steps.fill_(link.rank)
            model.weight.data.fill_(9.0 * link.rank)
            model.weight.grad = torch.zeros(3)
            optimizer.step()
        return model.mean.tolist(), model.steps.item(), model.weight.detach()

    ring = run(4, lambda link: member(link, Ring()))
    assert [each[0] for each in ring] == [[12.0] * 2, [9.0] * 2, [18.0] * 2, [15.0] * 2]
    assert [each[1] for each in ring] == [3, 2, 3, 3]
    peers = run(4, lambda link: member(link, Exponential()))  # rank - 1 is heard, rank + 1 is told
    assert [each[0] for each in peers] == [[13.5] * 2, [4.5] * 2, [13.5] * 2, [22.5] * 2]
    assert [each[1] for each in peers] == [3, 1, 2, 3]
    kite = run(5, lambda link: member(link, KITE))  # neighbours weigh unlike here
    by_matrix = mixing_matrix(KITE, 5) @ (9.0 * torch.arange(5, dtype=torch.float64))
    assert [each[0][0] for each in kite] == pytest.approx(by_matrix.tolist())
    for mean, _, weight in ring + peers + kite:
        assert torch.allclose(weight[:2], torch.tensor(mean))


def test_buffers_keep_constants_and_follow_weights():
    rows = {rank: (torch.tensor([0.1, float(rank)]), torch.tensor([rank])) for rank in (0, 1, 2)}
    mean, most = average(rows, {0: 1 / 3, 1: 1 / 3, 2: 1.0 - 2 / 3})
    assert mean[0].float() == torch.tensor(0.1)
    mean, most = average(rows, {1: 0.75, 2: 0.25})
    assert (mean[1].item(), most.item()) == (1.25, 2)
