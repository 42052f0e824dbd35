"""A forward pass at w + eps z: the same values as with perturbed copies put into the model, and nothing is written."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from thinwire.errors import ConfigError
from thinwire.seeds.directions import perturbed
from thinwire.seeds.noise import Rademacher
from thinwire.seeds.perturbing import Perturber
from thinwire.seeds.tensors import Tunable

EPS = 0.125


class Reader(nn.Module):
    """Tied, with padding, a parametrisation, a parameter used outside of any module, and one that is a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3000, 32, padding_idx=3)
        self.head = nn.Linear(32, 3000, bias=False)
        self.head.weight = self.embedding.weight
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.bias = nn.Parameter(torch.randn(3000))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embedding(x))) * self.scale + self.bias.view(1, -1)


SEQUENCE = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))
TOKENS = torch.arange(36).view(4, 9) * 7 % 300
MODELS = {
    "attention": (lambda: nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0), SEQUENCE),
    "recurrent": (lambda: _First(nn.LSTM(32, 8, 2)), SEQUENCE),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(7, 4, 3), nn.GroupNorm(2, 4), nn.PReLU()), SEQUENCE),
    "tied": (Reader, TOKENS),
    "half": (lambda: nn.Linear(32, 8).bfloat16(), SEQUENCE.bfloat16()),
}


class _First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


@pytest.mark.parametrize("name", MODELS)
def test_every_use_of_a_parameter_sees_its_perturbed_value(name):
    torch.manual_seed(0)
    make, x = MODELS[name]
    model = make()
    tunable = Tunable(model)
    before = tunable.digest()
    with Perturber(tunable, Rademacher()).at(5, EPS):
        found = model(x)
    copies = {each: perturbed(p, 5, each, EPS, Rademacher()) for each, p in tunable.pairs}
    with torch.no_grad():
        assert torch.equal(found, functional_call(model, copies, (x,), tie_weights=True))
        assert not torch.equal(found, model(x))
    assert tunable.digest() == before
    assert not found.requires_grad


def test_the_fused_path_of_attention_is_not_taken_behind_our_back():
    """In eval mode the layer is one fused kernel; within the block it takes its other path, which rounds otherwise."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    tunable = Tunable(model)
    with Perturber(tunable, Rademacher()).at(5, EPS):
        found = model(SEQUENCE)
    with torch.no_grad():
        for name, p in tunable.pairs:
            p.copy_(perturbed(p, 5, name, EPS, Rademacher()))
        torch.testing.assert_close(found, model(SEQUENCE))


def test_no_distance_is_the_model_itself():
    model = nn.Linear(4, 2)
    x = torch.randn(3, 4)
    with Perturber(Tunable(model), Rademacher()).at(5, 0.0):
        found = model(x)
    assert torch.equal(found, model(x).detach())


def test_an_embedding_makes_only_the_rows_that_are_looked_up(monkeypatch):
    asked = []
    from thinwire.seeds import perturbing as module

    def rows(w, index, *args):
        asked.append(index.tolist())
        return real(w, index, *args)

    real = module.perturbed_rows
    monkeypatch.setattr(module, "perturbed_rows", rows)
    model = nn.Embedding(100_000, 2)
    with Perturber(Tunable(model), Rademacher()).at(5, EPS):
        model(torch.tensor([[7, 3], [7, 99_999]]))
    assert asked == [[3, 7, 99_999]]


def test_a_limited_embedding_is_limited_as_it_is_looked_up_and_not_for_good():
    torch.manual_seed(0)
    model = nn.Embedding(9000, 4, max_norm=0.5)
    tunable = Tunable(model)
    before = tunable.digest()
    with Perturber(tunable, Rademacher()).at(5, EPS):
        found = model(torch.tensor([1, 2]))
    assert bool((found.norm(dim=1) <= 0.5 + 1e-6).all())
    assert tunable.digest() == before


def test_frozen_parameters_stay_as_they_are():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    tunable = Tunable(model)
    x = torch.randn(3, 4)
    with Perturber(tunable, Rademacher()).at(5, EPS):
        found = model[0](x)
        model[1](x)
    assert torch.equal(found, model[0](x).detach())
    assert list(tunable.parameters) == ["1.weight", "1.bias"]


def test_a_loss_that_does_not_use_the_model_is_refused():
    with (
        pytest.raises(ConfigError, match="no tunable parameter was used"),
        Perturber(Tunable(nn.Linear(2, 2)), Rademacher()).at(5, EPS),
    ):
        torch.ones(2).sum()


def test_a_compiled_model_is_refused():
    model = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        hidden = torch.jit.trace(model, torch.ones(1, 2), check_trace=False)
    with (
        pytest.raises(ConfigError, match="no tunable parameter was used"),
        Perturber(Tunable(model), Rademacher()).at(5, EPS),
    ):
        hidden(torch.ones(1, 2))


def test_a_scripted_part_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match="'1' is TorchScript"):
        Tunable(model)
    assert list(Tunable(model.requires_grad_(False)[1:].append(nn.Linear(2, 2))).parameters) == ["1.weight", "1.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_mode_in_a_loss_leaves_nothing_behind(dtype):
    torch.manual_seed(0)
    model = nn.Linear(200, 200).to(dtype)
    perturber, x = Perturber(Tunable(model), Rademacher()), torch.randn(3, 200, dtype=dtype)
    found = []
    for inside in (True, False, True):
        with perturber.at(5, EPS), torch.inference_mode(inside):
            found.append(model(x))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_is_no_row_of_an_embedding_is_refused():
    model = nn.Embedding(9000, 4)
    with pytest.raises(IndexError), Perturber(Tunable(model), Rademacher()).at(5, EPS):
        model(torch.tensor([-1, 2]))


def test_a_state_that_is_no_tensor_is_no_matter():
    class Telling(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"told": 1}

    tunable = Tunable(Telling(2, 2))
    assert not tunable.frozen


def test_running_statistics_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with (
        pytest.raises(ConfigError, match=r"buffer '1\.\w+' changes"),
        Perturber(Tunable(model), Rademacher()).at(5, EPS),
    ):
        model(torch.randn(8, 4))
    with Perturber(Tunable(model.eval()), Rademacher()).at(5, EPS):
        model(torch.randn(8, 4))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: nn.Linear(2, 2).requires_grad_(False), "no trainable parameter"),
        (lambda: nn.Linear(2, 2).double(), "torch.float64"),
    ],
)
def test_parameters_that_cannot_be_tuned_are_refused(model, words):
    with pytest.raises(ConfigError, match=words):
        Tunable(model())


def test_two_names_with_one_number_are_refused(monkeypatch):
    monkeypatch.setattr("thinwire.seeds.tensors.tensor_id", lambda name: 7)
    with pytest.raises(ConfigError, match="'weight' and 'bias' have one number, 7"):
        Tunable(nn.Linear(2, 2))


class _Pair(nn.Module):
    """Large parameters, two to a call, and views that are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.randn(1100, 1100)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        kept = self.one.t()  # a view of what was made, looked at after other parameters were made in its place
        both = self.one @ self.two
        return torch.addmm(self.two, x @ both, self.one) + kept


def test_memory_that_is_used_again_is_never_in_use():
    torch.manual_seed(0)
    model = _Pair()
    tunable, x = Tunable(model), torch.randn(1100, 1100)
    perturber = Perturber(tunable, Rademacher())
    copies = {each: perturbed(p, 5, each, EPS, Rademacher()) for each, p in tunable.pairs}
    for _ in range(2):
        with perturber.at(5, EPS):
            found = model(x)
        with torch.no_grad():
            assert torch.equal(found, functional_call(model, copies, (x,)))
    rooms = [perturber.room([(name, p)])[0] for name, p in tunable.pairs]
    assert rooms[0].data_ptr() == rooms[1].data_ptr()
