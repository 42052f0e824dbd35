"""Muon, LAMB and LARS against their formulas, and which parameters each takes."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from small import make_model
from thinwire.errors import ConfigError
from thinwire.train.gpt import gpt
from thinwire.train.layerwise import hidden_matrices, lamb, lars, muon
from thinwire.train.optimizer import OptimizerOptions, options_of


class Two(nn.Module):
    """One matrix and one vector, as the hand-computed steps have them."""

    def __init__(self, matrix: list[list[float]], vector: list[float]) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor(matrix, dtype=torch.float64))
        self.vector = nn.Parameter(torch.tensor(vector, dtype=torch.float64))


def stepped(
    make, model: Two, gradients: list[tuple[list[list[float]], list[float]]], **options
) -> tuple[Tensor, Tensor]:
    optimizers = make(model, **options)
    for matrix, vector in gradients:
        model.matrix.grad = torch.tensor(matrix, dtype=torch.float64)
        model.vector.grad = torch.tensor(vector, dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.step()
    return model.matrix.detach(), model.vector.detach()


# --- LAMB -------------------------------------------------------------------------------------------------------


def test_two_steps_of_lamb_by_hand():
    """m and v as Adam's without bias correction; u = m/sqrt(v) + 0.5 w; the step is lr |w|/|u| u. Vectors are Adam's.

    Tolerance: the library adds 1e-6 to |u|, which is above 1 here.
    """
    w = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    m = v = torch.zeros(1, 2, dtype=torch.float64)
    gradients = [([[1.0, -2.0]], [3.0]), ([[0.5, 1.0]], [-1.0])]
    for matrix, _ in gradients:
        g = torch.tensor(matrix, dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = m / (v.sqrt() + 1e-6) + 0.5 * w
        w = w - 0.1 * w.norm() / u.norm() * u
    matrix, vector = stepped(lamb, Two([[3.0, 4.0]], [2.0]), gradients, lr=0.1, weight_decay=0.5)
    assert torch.allclose(matrix, w, rtol=0, atol=2e-6)
    # Adam's first step is lr, to eps; its second: m = 0.9 * 0.3 - 0.1 = 0.17, v = 0.999 * 0.009 + 0.001 = 0.009991
    second = 0.17 / (1 - 0.81) / (0.009991 / (1 - 0.999**2)) ** 0.5
    assert vector.item() == pytest.approx(2.0 - 0.1 - 0.1 * second, abs=1e-6)


def test_lambs_first_step_is_as_long_as_the_matrix_times_lr():
    """Not ten times as long, which is the library's own default, nor shorter for a matrix longer than 10."""
    model = Two([[30.0, 40.0]], [1.0])
    before = model.matrix.detach().clone()
    matrix, _ = stepped(lamb, model, [([[1.0, -2.0]], [0.0])], lr=0.01)
    assert (before - matrix).norm().item() == pytest.approx(0.01 * 50.0, rel=1e-5)


def test_lambs_first_step_does_not_depend_on_the_size_of_gradients():
    one = stepped(lamb, Two([[3.0, 4.0]], [2.0]), [([[1.0, -2.0]], [3.0])], lr=0.1, weight_decay=0.5)
    other = stepped(lamb, Two([[3.0, 4.0]], [2.0]), [([[1e3, -2e3]], [3e3])], lr=0.1, weight_decay=0.5)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(one, other, strict=True)), "eps aside"


@pytest.mark.parametrize(("make", "options"), [(lamb, {}), (lars, {"momentum": 0.0})])
def test_a_matrix_twice_as_long_moves_twice_as_far(make, options):
    gradients = [([[1.0, -2.0]], [3.0])]
    one, _ = stepped(make, Two([[3.0, 4.0]], [2.0]), gradients, lr=0.1, **options)
    two, _ = stepped(make, Two([[6.0, 8.0]], [2.0]), gradients, lr=0.1, **options)
    moved = torch.tensor([[3.0, 4.0]], dtype=torch.float64) - one
    assert torch.allclose(torch.tensor([[6.0, 8.0]], dtype=torch.float64) - two, 2 * moved, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("make", "moved"),
    [(lamb, [0.1 * 0.1 / 0.001**0.5] * 2), (lars, [0.1 * 1.0, 0.1 * 2.0])],  # m / sqrt(v) = 0.1 / sqrt(0.001); g
)
def test_a_matrix_of_zeros_has_ratio_1(make, moved):
    matrix, _ = stepped(make, Two([[0.0, 0.0]], [0.0]), [([[1.0, 2.0]], [1.0])], lr=0.1)
    assert matrix.tolist()[0] == pytest.approx([-each for each in moved], rel=1e-4)


@pytest.mark.parametrize("make", [lamb, lars])
def test_biases_and_norms_do_not_decay_and_have_no_ratio(make):
    """Without a gradient's pull they stay; and one a thousand times as long moves as far."""
    still = [([[0.0, 0.0]], [0.0])]
    _, vector = stepped(make, Two([[3.0, 4.0]], [2.0]), still, lr=0.1, weight_decay=0.5)
    assert vector.item() == 2.0
    gradients = [([[1.0, 1.0]], [1.0])]
    _, near = stepped(make, Two([[3.0, 4.0]], [2.0]), gradients, lr=0.1, weight_decay=0.5)
    _, far = stepped(make, Two([[3.0, 4.0]], [2000.0]), gradients, lr=0.1, weight_decay=0.5)
    assert 2.0 - near.item() == pytest.approx(2000.0 - far.item(), rel=1e-9)


# --- LARS -------------------------------------------------------------------------------------------------------


def test_two_steps_of_lars_by_hand():
    """ratio = 0.001 |w| / (|g| + 0.5 |w|): 0.001 * 5 / (5 + 2.5) first; P <- 0.9 P + ratio (g + 0.5 w)."""
    w, p = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    gradients = [([[3.0, -4.0]], [3.0]), ([[0.5, 1.0]], [-1.0])]
    for matrix, _ in gradients:
        g = torch.tensor(matrix, dtype=torch.float64)
        p = 0.9 * p + 0.001 * w.norm() / (g.norm() + 0.5 * w.norm()) * (g + 0.5 * w)
        w = w - 10.0 * p
    matrix, vector = stepped(lars, Two([[3.0, 4.0]], [2.0]), gradients, lr=10.0, weight_decay=0.5)
    assert torch.allclose(matrix, w, rtol=0, atol=1e-12)
    assert vector.item() == pytest.approx(2.0 - 10 * 3.0 - 10 * (0.9 * 3.0 - 1.0), abs=1e-12)


@pytest.mark.parametrize("option", [{"momentum": 0.5}, {"weight_decay": 0.1}, {"trust": 0.01}, {"nesterov": True}])
def test_every_option_of_lars_counts(option):
    gradients = [([[3.0, -4.0]], [3.0])] * 2
    plain = stepped(lars, Two([[3.0, 4.0]], [2.0]), gradients, lr=1.0)
    assert not torch.equal(stepped(lars, Two([[3.0, 4.0]], [2.0]), gradients, lr=1.0, **option)[0], plain[0])


@pytest.mark.parametrize("option", [{"betas": (0.5, 0.9)}, {"weight_decay": 0.1}, {"eps": 0.1}])
def test_every_option_of_lamb_counts(option):
    gradients = [([[3.0, -4.0]], [3.0]), ([[1.0, 1.0]], [3.0])]
    plain = stepped(lamb, Two([[3.0, 4.0]], [2.0]), gradients, lr=0.1)
    assert not torch.equal(stepped(lamb, Two([[3.0, 4.0]], [2.0]), gradients, lr=0.1, **option)[0], plain[0])


@pytest.mark.parametrize(("make", "name"), [(lamb, "LAMB"), (lars, "LARS")])
def test_without_the_library(make, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    text = rf"{name} needs pytorch_optimizer, which .*\n.*extra 'optimizers'\n.*pip install 'thinwire\[optimizers\]'"
    with pytest.raises(ConfigError, match=text):
        make(make_model(), lr=0.1)


# --- Muon -------------------------------------------------------------------------------------------------------


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    """MuLoCo's rule. In the GPT, embedding and head are one matrix or two, and positions a table of the model's own."""
    for tied in (True, False):
        model = gpt("0.2M", vocab=65, context=16, tied=tied)
        names = {name for name, p in model.named_parameters() if any(p is each for each in hidden_matrices(model))}
        layers = ["attention.read", "attention.write", "mlp_read", "mlp_write"]
        assert names == {f"blocks.{n}.{layer}.weight" for n in range(4) for layer in layers}
        first, second = muon(model, lr=0.01)
        assert (type(first).__name__, type(second).__name__) == ("Muon", "AdamW")
        held = [p for each in (first, second) for group in each.param_groups for p in group["params"]]
        assert len({id(p) for p in held}) == len(held) == len(list(model.parameters()))


def test_what_is_frozen_is_in_neither():
    model = make_model()
    model[2].requires_grad_(False)
    optimizers = muon(model, lr=0.01)
    assert [p.shape for p in optimizers[0].param_groups[0]["params"]] == [model[0].weight.shape]
    assert len(optimizers[1].param_groups[0]["params"]) == 3  # two biases and the head
    model.requires_grad_(False)
    model[0].weight.requires_grad_(True)
    assert [type(each).__name__ for each in muon(model, lr=0.01)] == ["Muon"], "no rest, no AdamW"


def test_a_model_without_a_hidden_matrix_is_refused():
    text = r"no matrix for Muon beside embeddings and its last layer\n.*hidden layers.*\n.*use AdamW"
    with pytest.raises(ConfigError, match=text):
        muon(nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 3)), lr=0.1)


@pytest.mark.parametrize(
    "option",
    [
        {"weight_decay": 0.0}, {"momentum": 0.5}, {"nesterov": False}, {"ns_steps": 2}, {"adjust_lr_fn": "original"},
        {"adamw_lr": 0.1}, {"adamw_betas": (0.5, 0.5)},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_of_muon_counts(option):
    def trained(**options):
        model = make_model()
        optimizers = muon(model, lr=0.01, **options)
        for number in range(2):
            for position, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * number + position))
            for optimizer in optimizers:
                optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert not torch.equal(trained(**option), trained())


def test_adamw_keeps_its_share_of_the_learning_rate_as_it_rises_and_falls():
    options = OptimizerOptions("Muon", lr=0.02, warmup_steps=4, options={"adamw_lr": 0.002})
    optimizers = options.build(make_model())
    options.set_lr(optimizers, 1, steps=10)
    assert [group["lr"] for each in optimizers for group in each.param_groups] == pytest.approx([0.01, 0.001])


@pytest.mark.parametrize("shape", [(32, 64), (64, 32)])
def test_muons_step_is_nearly_orthogonal(shape):
    """Singular values of the step over lr c. torch's coefficients trade closeness for speed: 0.68 to 1.14 here.

    The five sets of coefficients that MuLoCo's authors use come within 4 % (see tests/identities/test_muloco.py).
    """
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False), nn.Linear(shape[0], 2, bias=False))
    nn.init.zeros_(model[0].weight)
    optimizer, _ = muon(model, lr=1.0, weight_decay=0.0, adjust_lr_fn="original")
    model[0].weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    values = torch.linalg.svdvals(model[0].weight.detach() / max(1, shape[0] / shape[1]) ** 0.5)
    assert 0.6 < values.min() < values.max() < 1.2


def test_options_are_those_of_the_functions():
    assert set(options_of("LAMB")) == {"betas", "eps", "weight_decay"}
    assert {"adamw_lr", "ns_steps", "adjust_lr_fn"} < set(options_of("Muon"))
    with pytest.raises(ConfigError, match=r"no optimizer 'Lamb' to use here\n.*\n.*did you mean 'LAMB'\?"):
        OptimizerOptions("Lamb")
    refused = OptimizerOptions("LAMB", options={"betas": (2.0, 0.9)})
    with pytest.raises(
        ConfigError, match=r"thinwire.train.layerwise.lamb refuses lr=0.002 with .*\n.*\n.*help\(thinwire"
    ):
        refused.build(make_model())
