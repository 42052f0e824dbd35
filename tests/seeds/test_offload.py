"""Offloaded tuning: waiting updates are the same updates, few stages are there at once, and sides make one side."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thinwire.errors import ConfigError, DivergedError, PacketError
from thinwire.links.base import Link
from thinwire.links.local import run
from thinwire.seeds import noise as noises
from thinwire.seeds.codes import float32
from thinwire.seeds.directions import apply_all_, perturbed_all
from thinwire.seeds.log import Closed
from thinwire.seeds.offload import Offloaded
from thinwire.seeds.recipe import Recipe, seed_of
from thinwire.seeds.shelves import FileShelf, HostShelf, Shelf
from thinwire.seeds.sides import SidedTuner
from thinwire.seeds.tensors import Tunable
from thinwire.seeds.updates import Update

WIDTH = 6
EXACT = Recipe(code="whole", clip=None, eps=1e-2)


def whole(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(WIDTH, 9), nn.Sequential(nn.Tanh(), nn.Linear(9, 9), nn.Dropout(dropout)),
        nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 9)), nn.Linear(9, 3),
    ).to(dtype)  # fmt: skip


def stages(model: nn.Sequential) -> dict[str, nn.Module]:
    return {str(i): stage for i, stage in enumerate(model)}


def batch(step: int, group: int = 0, size: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1000 * group + step)
    x = torch.randn(size, WIDTH, generator=g)
    return x, x[:, :3].argmax(dim=1)


def losses_of(step: int, group: int = 0, dtype: torch.dtype = torch.float32):
    x, y = batch(step, group)
    return x.to(dtype), lambda output: nn.functional.cross_entropy(output.float(), y)


def tuned(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p.detach()) for name, p in model.named_parameters()]


def offloaded(model: nn.Sequential, recipe: Recipe = EXACT, shelf: Shelf | None = None) -> Offloaded:
    return Offloaded(stages(model), shelf or HostShelf(model.state_dict()), recipe)


def immediate(recipe: Recipe, steps: int, model: nn.Sequential, dtype: torch.dtype = torch.float32) -> list[float]:
    """The same in a few plain lines: perturb all, look at the loss, move all at once."""
    noise, state, scalars = noises.parse(recipe.noise), recipe.start(), []
    for step in range(steps):
        x, loss = losses_of(step, dtype=dtype)
        told = []
        for sample in range(recipe.samples):
            seed, found = seed_of(recipe.seed, step, 0, sample), []
            for eps in (float32(recipe.eps), -float32(recipe.eps)):
                moved = perturbed_all(tuned(model), seed, eps, noise)
                values = dict(zip((name for name, _ in tuned(model)), moved, strict=True))
                with torch.no_grad():
                    found.append(torch.func.functional_call(model, values, (x,)))
            plus, minus = torch.tensor([float(loss(output)) for output in found]).tolist()
            told.append((plus - minus) / (2 * float32(recipe.eps)))
        scalars += told
        closed = Closed(step, 0.05, {0: bytes(recipe.encode(told, state, step, 0).numpy())})
        state, update = recipe.step(state, closed)
        apply_all_(tuned(model), [update], noise, rounding=recipe.rounding, key=recipe.seed)
    return scalars


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        (EXACT, torch.float32),
        (Recipe(samples=2, rule="momentum(0.9)", decay=0.1, eps=1e-2), torch.float32),
        (Recipe(eps=1e-2, noise="binomial", seed=5), torch.bfloat16),
    ],
)
def test_deferred_is_immediate_to_the_bit(recipe: Recipe, dtype: torch.dtype) -> None:
    """Twenty steps of four stages. In bfloat16 rounding is drawn from the round, whenever it is done."""
    plain, streamed = whole(dtype), whole(dtype)
    expected = immediate(recipe, 20, plain, dtype)
    before = [w.clone() for _, w in tuned(streamed)]
    with SidedTuner(offloaded(streamed, recipe), recipe) as tuner:
        found = [scalar for step in range(20) for scalar in tuner.step(*losses_of(step, dtype=dtype), lr=0.05).scalars]
    assert found == expected
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tuned(plain), tuned(streamed), strict=True))
    assert not all(torch.equal(a, b) for a, (_, b) in zip(before, tuned(streamed), strict=True))
    assert tuner.log.result == Tunable(plain).digest()
    assert tuner.log.base == Tunable(whole(dtype)).digest()


def test_what_waits_is_applied_before_anything_is_read() -> None:
    model, plain = whole(), whole()
    streamed = offloaded(model)
    x, _ = batch(0)
    untouched = plain(x)
    for number in range(3):
        update = Update((number + 5,), (0.25,), round=number)
        streamed.apply(update)
        apply_all_(tuned(plain), [update])
    assert not torch.equal(streamed.forward(x), untouched)
    assert torch.equal(streamed.forward(x), plain(x))
    streamed.apply(Update((9,), (0.25,)))
    waits = Tunable(model).digest()
    assert waits == Tunable(plain).digest(), "it waits"
    assert streamed.digest() != Tunable(plain).digest()
    apply_all_(tuned(plain), [Update((9,), (0.25,))])
    assert Tunable(model).digest() == Tunable(plain).digest(), "a digest is of what all updates made"


def test_a_pass_that_fails_leaves_each_stage_to_catch_up() -> None:
    """Stages that were reached have their update, the others wait for it: nothing is applied twice."""

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("a disk burns")
            return x

    plain = whole()
    model = whole()
    breaks = Fails()
    streamed = Offloaded(
        {**stages(model)} | {"1": nn.Sequential(*model[1], breaks)}, HostShelf(model.state_dict()), EXACT
    )
    update = Update((5,), (0.25,))
    streamed.apply(update)
    with pytest.raises(RuntimeError, match="a disk burns"):
        streamed.forward(batch(0)[0])
    breaks.eval()
    apply_all_(tuned(plain), [update])
    assert torch.equal(streamed.forward(batch(0)[0]), plain(batch(0)[0]))


class Ledger:
    """A shelf whose tensors are counted as they come and go, by stage."""

    def __init__(self, inner: Shelf) -> None:
        self._inner, self.here, self.most = inner, {}, 0

    @property
    def names(self) -> tuple[str, ...]:
        return self._inner.names

    def get(self, name: str) -> Tensor:
        tensor = self._inner.get(name)
        self.here[name] = self.here.get(name, 0) + 1
        weakref.finalize(tensor, self._gone, name)
        self.most = max(self.most, len({name.split(".")[0] for name, count in self.here.items() if count}))
        return tensor

    def _gone(self, name: str) -> None:
        self.here[name] -= 1

    def put(self, name: str, tensor: Tensor) -> None:
        self._inner.put(name, tensor)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(whole().state_dict(), path)
    return path


def test_two_stages_are_there_at_once_and_none_afterwards(file: Path) -> None:
    shelf = Ledger(FileShelf(file))
    with torch.device("meta"):
        skeleton = whole()
    streamed = Offloaded(stages(skeleton), shelf, EXACT)
    gc.collect()
    shelf.most = 0
    with SidedTuner(streamed, EXACT) as tuner:
        shelf.most = 0
        for step in range(5):
            tuner.step(*losses_of(step), lr=0.05)
    assert shelf.most == 2
    assert not any(shelf.here.values())
    assert all(p.is_meta for p in skeleton.parameters())


def test_weights_are_brought_once_a_step() -> None:
    recipe = Recipe(samples=3, eps=1e-2)
    tuner = SidedTuner(offloaded(whole(), recipe), recipe)
    before = tuner.model.brought
    for step in range(5):
        tuner.step(*losses_of(step), lr=0.05)
    assert tuner.model.brought - before == 5 * 4


def test_a_file_is_tuned_as_memory_is(file: Path) -> None:
    plain = whole()
    immediate(EXACT, 6, plain)
    with torch.device("meta"):
        skeleton = whole()
    with SidedTuner(Offloaded(stages(skeleton), FileShelf(file), EXACT), EXACT) as tuner:
        for step in range(6):
            tuner.step(*losses_of(step), lr=0.05)
    written = load_file(file)
    assert all(torch.equal(written[name], w) for name, w in tuned(plain))


# --- members ---------------------------------------------------------------------------------------------------------


def together(members: int, steps: int, *, sides: bool, dropout: float = 0.0, recipe: Recipe = EXACT):
    """Everybody's scalars and weights."""

    def work(link: Link):
        model = whole(dropout=dropout)
        group = link.rank // 2 if sides else link.rank
        torch.manual_seed(7)
        with SidedTuner(offloaded(model, recipe), recipe, link, sides=sides) as tuner:
            told = [tuner.step(*losses_of(step, group), lr=0.05) for step in range(steps)]
        return [s for step in told for s in step.scalars], [w for _, w in tuned(model)], link.meter

    return run(members, work)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_side_each_is_one_machine_to_the_bit(dropout: float) -> None:
    ((alone, weights, _),) = together(1, 8, sides=False, dropout=dropout)
    for told, held, _ in together(2, 8, sides=True, dropout=dropout):
        assert told == alone
        assert all(torch.equal(a, b) for a, b in zip(held, weights, strict=True))


def test_two_pairs_are_two_machines_with_data_of_their_own() -> None:
    """2D: pairs within groups of unlike batches."""
    two, four = together(2, 8, sides=False), together(4, 8, sides=True)
    assert {tuple(told) for told, _, _ in two} == {tuple(told) for told, _, _ in four}
    assert all(torch.equal(a, b) for a, b in zip(two[0][1], four[3][1], strict=True))


def test_the_mean_of_scalars_is_that_of_the_batches_together() -> None:
    """Losses are means over alike batches: g is linear in them, to float32 rounding of losses of about 1 over 2 eps."""
    (scalars, _, _), *_ = together(2, 1, sides=False)
    x, y = (torch.cat(both) for both in zip(batch(0, 0), batch(0, 1), strict=True))
    streamed = offloaded(whole())
    seed = seed_of(EXACT.seed, 0, 0, 0)
    plus, minus = (
        nn.functional.cross_entropy(output.double(), y).item()
        for output in streamed.probe(x, [(seed, float32(1e-2)), (seed, -float32(1e-2))])
    )
    assert scalars[0] == pytest.approx((plus - minus) / 2e-2, abs=4 * 2.0**-24 * 2 / 2e-2)


def test_members_with_another_frozen_part_are_refused_stage_by_stage() -> None:
    def member(link: Link) -> None:
        model = whole()
        nn.init.constant_(model[0].requires_grad_(False).bias, float(link.rank))
        with SidedTuner(offloaded(model), EXACT, link):
            pass

    with pytest.raises(ConfigError, match="frozen"):
        run(2, member)


def test_members_say_a_float_for_every_loss() -> None:
    (_, _, one), _ = together(2, 4, sides=True, recipe=Recipe(samples=8))
    (_, _, both), _ = together(2, 4, sides=False, recipe=Recipe(samples=8))
    sent = [meter.by_purpose()["losses"].sent_bytes for meter in (one, both)]
    assert sent[1] - sent[0] == 4 * 8 * 4


def test_a_group_without_a_finite_loss_is_left_out() -> None:
    def work(link: Link):
        with SidedTuner(offloaded(whole()), EXACT, link) as tuner:
            x, loss = losses_of(0)
            return tuner.step(x, loss if link.rank else lambda output: float("inf"), lr=0.05).scalars

    (alone,) = run(1, lambda link: SidedTuner(offloaded(whole()), EXACT, link).step(*losses_of(0), lr=0.05).scalars)
    assert run(2, work) == [alone, alone]


def test_nothing_moves_without_losses_and_that_does_not_go_on_for_ever() -> None:
    model = whole()
    before = Tunable(model).digest()
    tuner = SidedTuner(offloaded(model), EXACT)
    for _ in range(19):
        tuner.step(batch(0)[0], lambda output: float("nan"), lr=0.05)
    with pytest.raises(DivergedError, match="no member had finite losses for 20 rounds"):
        tuner.step(batch(0)[0], lambda output: float("nan"), lr=0.05)
    tuner.model.flush()
    assert Tunable(model).digest() == before


# --- refusals --------------------------------------------------------------------------------------------------------


def test_an_odd_number_has_no_pairs() -> None:
    with pytest.raises(ConfigError, match="two sides among 3 members\n  expected  an even number"):
        run(3, lambda link: SidedTuner(offloaded(whole()), EXACT, link, sides=True))


def test_members_with_other_weights_are_told() -> None:
    def work(link: Link):
        model = whole()
        if link.rank:
            model[0].bias.data[0] += 1
        with SidedTuner(offloaded(model), EXACT, link):
            pass

    with pytest.raises(ConfigError, match="members disagree on base"):
        run(2, work)


def test_a_shelf_without_a_tensor_is_refused() -> None:
    state = whole().state_dict()
    del state["2.1.weight"]
    with pytest.raises(ConfigError, match=r"'2.1.weight' is not there on the shelf"):
        offloaded(whole(), shelf=HostShelf(state))
    with pytest.raises(ConfigError, match=r"'0.bias' is of \(4,\) on the shelf\n  expected  a tensor of \(9,\)"):
        offloaded(whole(), shelf=HostShelf({**whole().state_dict(), "0.bias": torch.zeros(4)}))


def test_weights_of_two_stages_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ConfigError, match="stages 0 and 1 share a parameter"):
        offloaded(model)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="no stage has a trainable parameter"):
        offloaded(whole().requires_grad_(False))


def test_frozen_stages_and_buffers_stay() -> None:
    model = whole()
    model[2].requires_grad_(False)
    before = {name: w.clone() for name, w in tuned(model)}
    with SidedTuner(offloaded(model), EXACT) as tuner:
        tuner.step(*losses_of(0), lr=0.05)
    changed = {name for name, w in tuned(model) if not torch.equal(before[name], w)}
    assert {name.split(".")[0] for name in changed} == {"0", "1", "3"}
    assert set(tuner.log.frozen) == {name for name in before if name.startswith("2.")}


def test_running_statistics_are_refused() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 3), nn.BatchNorm1d(3))
    with pytest.raises(ConfigError, match=r"'1.running_mean' changes as its stage computes|'1.num_batches_tracked'"):
        offloaded(model).forward(batch(0)[0])
    offloaded(model.eval()).forward(batch(0)[0])


def test_files_that_are_none_or_cut_off_are_refused(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    with pytest.raises(ConfigError, match=r"has \d+ bytes\n  expected  \d+ bytes, as its header says"):
        FileShelf(file)
    file.write_bytes(b"\x07" * 100)
    with pytest.raises(ConfigError, match="has no header of a safetensors file"):
        FileShelf(file)
    file.write_bytes(data)
    shelf = FileShelf(file)
    file.write_bytes(data[:-10])
    with pytest.raises(PacketError, match="ends within"):
        [shelf.get(name) for name in shelf.names]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_a_file_gives_and_takes_tensors_of_every_kind(tmp_path: Path, dtype: torch.dtype) -> None:
    held = {"a": torch.arange(6).view(2, 3).to(dtype), "b": torch.tensor(1).to(dtype), "c": torch.zeros(0, dtype=dtype)}
    save_file(held, tmp_path / "x.safetensors", metadata={"told": "by"})
    shelf = FileShelf(tmp_path / "x.safetensors")
    assert set(shelf.names) == {"a", "b", "c"}
    assert all(torch.equal(shelf.get(name), held[name]) for name in held)
    shelf.put("a", held["a"].flip(0))
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], held["a"].flip(0))
    assert torch.equal(shelf.get("b"), held["b"])
