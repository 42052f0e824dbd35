"""MuLoCo, SparseLoCo and DiLoCo with PowerSGD: compressed changes of many local steps, with a memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinwire
from small import adamw, batch, local_steps, loss_of, make_model, same, train
from thinwire import ConfigError, diloco, local_sgd, muloco, sparse_loco
from thinwire.codecs import bf16, ef21, feedback, int8, kmeans, layers, powersgd, topk
from thinwire.links.local import run
from thinwire.method import Method
from thinwire.outer import SGD, Nesterov, Now
from thinwire.topologies import Islands
from thinwire.train.layerwise import muon

TWO_BITS = feedback(layers(kmeans(4), small=16), decay=0.9)


def muon_steps(model: nn.Module, optimizers: list[torch.optim.Optimizer], rank: int, numbers: range) -> None:
    for number in numbers:
        loss_of(model, *batch(number, rank)).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def with_muon(link: Any, method: Method, steps: int) -> Tensor:
    model = make_model()
    optimizers = muon(model, lr=0.02)
    with thinwire.synchronize(model, optimizers, method, link):
        muon_steps(model, optimizers, link.rank, range(steps))
    return vector(model)


# --- MuLoCo -----------------------------------------------------------------------------------------------------


def test_with_dilocos_options_it_is_diloco():
    ours = muloco(every=4, outer_lr=0.7, momentum=0.5, codec=int8)
    assert ours == diloco(every=4, outer_lr=0.7, momentum=0.5, codec=int8)
    assert muloco().answers() == diloco(every=30, outer_lr=0.8, momentum=0.9).answers()


def test_muloco_in_two_bits_is_its_algorithm_box():
    """Two members in plain torch: Muon and AdamW inside, a memory that keeps 0.9, Nesterov outside. To the bit."""
    members, every, steps = 2, 3, 9
    ours = run(members, lambda link: with_muon(link, muloco(every=every, codec=TWO_BITS), steps))
    models = [make_model() for _ in range(members)]
    inner = [muon(model, lr=0.02) for model in models]
    anchor, memory = vector(models[0]), [torch.zeros_like(vector(models[0])) for _ in models]
    outer = torch.optim.SGD([anchor], lr=0.8, momentum=0.9, nesterov=True)
    for first in range(0, steps, every):
        sent = []
        for rank, model in enumerate(models):
            muon_steps(model, inner[rank], rank, range(first, first + every))
            memory[rank] = (anchor - vector(model)).add(memory[rank], alpha=0.9)
            q = torch.cat([_quantised(part) for part in memory[rank].split([p.numel() for p in model.parameters()])])
            memory[rank] = memory[rank] - q
            sent.append(q)
        anchor.grad = (sent[0] + sent[1]) / members
        outer.step()
        for model in models:
            nn.utils.vector_to_parameters(anchor.clone(), model.parameters())
    assert torch.equal(ours[0], anchor)
    assert torch.equal(ours[1], anchor)


def _quantised(part: Tensor) -> Tensor:
    """Matrices of the small model have at least 80 entries, its biases 16 at most: these go as they are."""
    codec = kmeans(4)
    return codec.decode(codec.encode(part, 0), len(part), 0) if len(part) > 16 else part


def test_the_optimizer_inside_counts():
    a = run(2, lambda link: with_muon(link, muloco(every=3), 6))
    b = run(2, lambda link: torch.cat([p.flatten() for p in train(link, muloco(every=3), 6).live]))
    assert not torch.equal(a[0], b[0])


def test_nesterovs_step_is_the_form_that_holds_one_vector_of_steps():
    """u <- mu u + eta D;  a <- a - mu u - eta D is the authors' form. Tolerance: 12 float32 steps."""
    generator = torch.Generator().manual_seed(0)
    a = b = torch.randn(100, generator=generator)
    u, memory = torch.zeros(100), {}
    for _ in range(12):
        d = torch.randn(100, generator=generator)
        u = 0.9 * u + 0.8 * d
        a = a - 0.9 * u - 0.8 * d
        b, memory = Nesterov(0.8, 0.9).step(b, d, memory, Now())
    assert torch.allclose(a, b, rtol=0, atol=12 * 8 * 2.0**-24 * float(a.abs().max()))


COEFFICIENTS = [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_authors_coefficients_orthogonalise_closer_than_torchs(dtype):
    """What the card says of singular values, on random matrices twice as wide as high."""
    from torch.optim._muon import _zeropower_via_newtonschulz as torchs

    for seed in range(3):
        g = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        x = (g / g.norm()).to(dtype)
        for a, b, c in COEFFICIENTS:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        theirs = torch.linalg.svdvals(x.float())
        assert 0.95 < theirs.min() < theirs.max() < 1.05
        ours = torch.linalg.svdvals(torchs(g, (3.4445, -4.7750, 2.0315), 5, 1e-7).float())
        assert 0.65 < ours.min() < 0.75
        assert 1.05 < ours.max() < 1.2


def test_two_bits_lose_less_than_means_of_fixed_intervals():
    """kmeans(4) against the authors' grid at -3, -1.5, 0, 1.5 standard deviations, on a change that Muon made."""
    model = make_model()
    before = vector(model)
    muon_steps(model, muon(model, lr=0.02), 0, range(30))
    delta = (before - vector(model))[: 12 * 16]  # the first matrix
    index = ((delta - delta.mean()) / (1.5 * delta.std()) + 2).round().clamp(0, 3)
    theirs = torch.stack(
        [torch.where(index == j, delta[index == j].mean(), 0.0) for j in range(4) if (index == j).any()]
    )
    assert (delta - _quantised(delta)).norm() < (delta - theirs.sum(dim=0)).norm()


# --- SparseLoCo -----------------------------------------------------------------------------------------------------


def test_sparse_loco_is_its_algorithm_box():
    """Four members in plain torch: the largest eighth of every 64 entries, as one of four values. To the bit."""
    members, every, steps, codec = 4, 3, 9, topk(1 / 8, block=64) | kmeans(4)
    ours = run(members, lambda link: train(link, sparse_loco(every=every, codec=codec, outer_lr=0.7), steps).live)
    models = [make_model() for _ in range(members)]
    inner = [adamw(model) for model in models]
    anchor = vector(models[0])
    memory = [torch.zeros_like(anchor) for _ in models]
    for first in range(0, steps, every):
        sent = []
        for rank, model in enumerate(models):
            local_steps(model, inner[rank], rank, range(first, first + every))
            memory[rank] = (anchor - vector(model)).add(memory[rank], alpha=0.95)
            kept = torch.zeros_like(anchor, dtype=torch.bool)
            for start in range(0, len(anchor), 64):
                chunk = memory[rank][start : start + 64]
                kept[start + chunk.abs().topk(-(-len(chunk) // 8)).indices] = True
            values = memory[rank][kept]
            q = torch.zeros_like(anchor).masked_scatter(kept, _quantised(values))
            memory[rank] = memory[rank] - q
            sent.append(q)
        anchor = anchor.sub((((sent[0] + sent[1]) + sent[2]) + sent[3]) / members, alpha=0.7)
        for model in models:
            nn.utils.vector_to_parameters(anchor.clone(), model.parameters())
    assert torch.equal(torch.cat([p.flatten() for p in ours[2]]), anchor)


def test_with_everything_sent_it_is_averaging():
    """topk(1) leaves nothing to wait, so no decay matters: federated averaging of changes."""
    averaging = local_sgd(every=3).but(payload=thinwire.diloco().payload, outer=SGD(1.0))
    results = [run(3, lambda link, method=method: train(link, method, 7).live) for method in (
        averaging, sparse_loco(every=3, codec=topk(1.0)), sparse_loco(every=3, codec=topk(1.0), decay=0.0)
    )]  # fmt: skip
    assert same(results[0][0], results[1][0])
    assert same(results[0][0], results[2][0])


def test_a_codec_with_a_memory_of_its_own_is_refused():
    with pytest.raises(ConfigError, match=r"feedback around EF21.*\n.*a codec, or a chain.*\n.*one feedback"):
        sparse_loco(codec=ef21(topk(1 / 4)))  # type: ignore[arg-type]


def test_what_is_sent_is_a_two_hundredth():
    """10 bits for each 64th entry, against 32 for every one: 205 times fewer, packets' headers aside."""
    n, codec = 1 << 20, sparse_loco().bare_codec
    fields = codec.encode(torch.randn(n, generator=torch.Generator().manual_seed(0)), 0)  # type: ignore[union-attr]
    assert 190 < 4 * n / sum(field.numel() * field.element_size() for field in fields.values()) < 220


# --- nothing is lost ------------------------------------------------------------------------------------------------


def kept_account(link: Any, method: Method, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """All this member did, all that reached the common model, what still waits: sums over rounds, float64."""
    model = make_model()
    optimizer = adamw(model)
    before: list[Tensor] = []
    optimizer.register_step_post_hook(lambda *_: before.append(vector(model)))  # runs before the round
    with thinwire.synchronize(model, optimizer, method, link) as sync:
        start, done = sync.consensus()[0].double(), torch.zeros(len(vector(model)), dtype=torch.float64)
        for number in range(steps):
            anchor, rounds = sync.consensus()[0], sync.committed
            local_steps(model, optimizer, link.rank, range(number, number + 1))
            if sync.committed > rounds:
                done += anchor.double() - before[-1].double()
        reached = start - sync.consensus()[0].double()
        waits = sync.state_dict()["fragments"][0]["carried"]["own"]["residual"]
    return done, reached, waits.double()


CONSERVING = {
    "muloco": (2, muloco(every=2, codec=feedback(layers(kmeans(4), small=16))).but(outer=SGD(1.0))),
    "sparse loco": (4, sparse_loco(every=2, decay=1.0, codec=topk(1 / 8, block=64) | kmeans(4))),
    "diloco powersgd": (3, diloco(every=2, codec=powersgd(2)).but(outer=SGD(1.0))),
}


@pytest.mark.parametrize("name", CONSERVING)
def test_what_was_done_has_arrived_or_waits(name):
    """sum of D = sum of what was combined + mean residual. Tolerance: 20 rounds of float32 sums of entries below 1."""
    members, method = CONSERVING[name]
    accounts = run(members, lambda link: kept_account(link, method, 40))
    done = sum(account[0] for account in accounts) / members
    waits = sum(account[2] for account in accounts) / members
    assert waits.norm() > 1e-3 * done.norm(), "something waits"
    assert torch.allclose(done, accounts[0][1] + waits, rtol=0, atol=20 * 8 * 2.0**-24)


def test_a_memory_that_fades_loses_something():
    members, fading = 4, sparse_loco(every=2, decay=0.5, codec=topk(1 / 8, block=64))
    accounts = run(members, lambda link: kept_account(link, fading, 40))
    done, waits = (sum(account[at] for account in accounts) / members for at in (0, 2))
    assert (done - accounts[0][1] - waits).norm() > 0.05 * done.norm()


# --- DiLoCo with PowerSGD, and across sites --------------------------------------------------------------------


def test_powersgd_of_full_rank_is_diloco():
    """Ranks of 16 hold every matrix of the model. Tolerance: three rounds of float32 projections."""
    full = run(3, lambda link: train(link, diloco(every=3, codec=powersgd(16)), 9).live)
    plain = run(3, lambda link: train(link, diloco(every=3), 9).live)
    low = run(3, lambda link: train(link, diloco(every=3, codec=powersgd(1)), 9).live)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(full[0], plain[0], strict=True))
    assert not all(torch.allclose(a, b, rtol=0, atol=1e-3) for a, b in zip(low[0], plain[0], strict=True))


@pytest.mark.parametrize("codec", [None, bf16, TWO_BITS], ids=["fp32", "bf16", "two bits"])
def test_across_sites_only_leaders_talk(codec):
    """Two sites of two: whoever leads sends to the other site, the others send within; all end alike."""
    method = muloco(every=2) if codec is None else muloco(every=2, codec=codec)

    def member(link):
        model = make_model()
        optimizers = muon(model, lr=0.02)
        with thinwire.synchronize(model, optimizers, method.but(topology=Islands(2)), link):
            muon_steps(model, optimizers, link.rank, range(4))
        return vector(model), link.meter.by_purpose()["rounds"].sent_bytes

    results = run(4, member)
    assert all(torch.equal(results[0][0], other) for other, _ in results)
    sent = [count for _, count in results]
    assert sent[0] > sent[1]
    assert sent[2] > sent[3]
    if codec is TWO_BITS:
        whole = run(4, lambda link: _sent(link, method))
        assert sent[0] - sent[1] < max(whole), "across sites it is written in two bits"


def _sent(link: Any, method: Method) -> int:
    with_muon(link, method, 4)
    return link.meter.by_purpose()["rounds"].sent_bytes
