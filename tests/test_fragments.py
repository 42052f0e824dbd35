"""Named parameters to vectors and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from small import make_model
from thinwire.buffers import Buffers
from thinwire.errors import ConfigError
from thinwire.fragments import Fragments, digest


class Blocks(nn.Module):
    """Embedding, numbered blocks, a norm and a head tied to the embedding."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(blocks))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight


def models() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {
        "sequential": make_model(),
        "blocks": Blocks(5),
        "one parameter": nn.Linear(3, 1, bias=False),
        "scalars": nn.ParameterDict({"a": nn.Parameter(torch.tensor(2.0)), "b": nn.Parameter(torch.randn(2, 3))}),
        "mixed": nn.Sequential(nn.Linear(3, 3).bfloat16(), nn.Linear(3, 2), nn.Linear(2, 2).half()),
    }


@pytest.mark.parametrize("name", models())
def test_every_trainable_parameter_is_in_exactly_one_fragment(name):
    model = models()[name]
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    for count in range(1, len(trainable) + 1):
        fragments = Fragments(model, count)
        dealt = [n for f in range(count) for n in fragments.names(f)]
        assert sorted(dealt) == sorted(trainable)
        assert all(fragments.sizes), "no fragment is empty"
        assert sum(fragments.sizes) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", models())
def test_gather_and_scatter_are_inverses_to_the_bit(name):
    model = models()[name]
    fragments = Fragments(model, 1)
    before = [p.detach().clone() for p in model.parameters()]
    vector = fragments.gather(0)
    assert vector.dtype == torch.float32
    fragments.scatter(0, torch.zeros_like(vector))
    assert not any(bool(p.any()) for p in model.parameters())
    assert bool(vector.any()), "gather copies"
    fragments.scatter(0, vector)
    assert all(torch.equal(p, copy) for p, copy in zip(model.parameters(), before, strict=True))
    assert torch.equal(fragments.rounded(0, vector), vector)


def test_rounding_is_that_of_the_parameters():
    fragments = Fragments(models()["mixed"], 1)
    vector = torch.randn(sum(fragments.sizes))
    fragments.scatter(0, vector)
    assert torch.equal(fragments.rounded(0, vector), fragments.gather(0))
    assert not torch.equal(vector, fragments.gather(0))


def test_layers_are_dealt_in_strides_and_the_rest_to_the_smallest():
    fragments = Fragments(Blocks(5), 3)
    layers = [{name.split(".")[1] for name in fragments.names(f) if name.startswith("blocks")} for f in range(3)]
    assert layers == [{"0", "3"}, {"1", "4"}, {"2"}]
    assert "embed.weight" in fragments.names(2), "the largest of the rest goes to the smallest fragment"
    assert "norm.weight" in fragments.names(0)


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12), count=st.integers(1, 12))
def test_sizes_are_balanced_within_the_largest_parameter(sizes, count):
    model = nn.ParameterDict({f"p{'x' * i}": nn.Parameter(torch.zeros(size)) for i, size in enumerate(sizes)})
    if count > len(sizes):
        with pytest.raises(ConfigError, match=f"{count} fragments of a model with {len(sizes)} parameters"):
            Fragments(model, count)
        return
    dealt = Fragments(model, count).sizes
    assert max(dealt) - min(dealt) <= max(sizes)


def test_tied_weights_are_one_and_frozen_ones_none():
    model = Blocks(2)
    names = Fragments(model, 1).names(0)
    assert "embed.weight" in names
    assert "head.weight" not in names
    model.embed.weight.requires_grad_(False)
    assert "embed.weight" not in Fragments(model, 1).names(0)


def test_gradients():
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    fragments = Fragments(model, 1)
    model[0].weight.grad = torch.tensor([[1.0, 2.0]])
    assert fragments.gather_gradients(0).tolist() == [1, 2, 0]
    fragments.scatter_gradients(0, torch.tensor([3.0, 4.0, 0.0]))
    assert model[0].weight.grad.tolist() == [[3, 4]]
    assert model[1].weight.grad is None, "absent and zero stays absent: the optimizer skips it"
    fragments.scatter_gradients(0, torch.tensor([3.0, 4.0, 5.0]))
    assert model[1].weight.grad.tolist() == [[5]]


def test_absent_bf16_gradients_come_in_the_parameters_dtype():
    model = nn.Linear(2, 1, bias=False).bfloat16()
    Fragments(model, 1).scatter_gradients(0, torch.tensor([1.0, 2.0]))
    assert model.weight.grad.dtype == torch.bfloat16


def test_matrices_are_views_in_the_parameters_shapes():
    fragments = Fragments(make_model(), 1)
    vector = fragments.gather(0)
    matrices = fragments.matrices(0, vector)
    assert matrices["0.weight"].shape == (16, 12)
    matrices["0.weight"].zero_()
    assert not bool(vector[: 16 * 12].any())


def test_the_schema_follows_names_shapes_dtypes_and_the_deal():
    def schema(model: nn.Module, count: int = 1) -> str:
        return Fragments(model, count).schema()

    base = schema(make_model())
    assert base == schema(make_model(seed=1)), "values do not matter"
    frozen = make_model()
    frozen[0].bias.requires_grad_(False)
    unlike = [make_model().bfloat16(), nn.Sequential(nn.Linear(12, 16)), nn.ModuleDict({"a": make_model()}), frozen]
    assert len({base, schema(make_model(), 2), *map(schema, unlike)}) == 6


@pytest.mark.parametrize(
    ("model", "count", "text"),
    [
        (nn.ReLU(), 1, "no trainable parameter\n.*requires_grad\n.*unfreeze"),
        (nn.Linear(2, 2).requires_grad_(False), 1, "no trainable parameter"),
        (nn.Linear(2, 2).double(), 1, "parameter 'weight' is torch.float64\n.*float32 or narrower.*\n.*model.float()"),
        (nn.ParameterDict({"c": torch.zeros(2, dtype=torch.complex64)}), 1, "parameter 'c' is torch.complex64"),
        (nn.Linear(2, 2), 3, "3 fragments of a model with 2 parameters\n.*each fragment\n.*fragments=2 or fewer"),
    ],
)
def test_refusals(model, count, text):
    with pytest.raises(ConfigError, match=text):
        Fragments(model, count)


def test_sparse_gradients_are_refused_in_words():
    model = nn.Embedding(4, 2, sparse=True)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match=r"gradient of parameter 'weight' is sparse\n.*dense.*\n.*sparse=False"):
        Fragments(model, 1).gather_gradients(0)


class Statistics(nn.Module):
    """Buffers of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([1.5, 2.5]))
        self.register_buffer("wide", torch.tensor(0.1, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.register_buffer("empty", torch.zeros(0))


def test_buffers_come_and_go_to_the_bit():
    module = Statistics()
    buffers = Buffers(module)
    assert buffers
    floats, counts = buffers.gather()
    assert floats.tolist() == [1.5, 2.5, 0.1], "float64 keeps its digits"
    assert counts.tolist() == [7, 1, 0]
    buffers.scatter(floats + 1, counts + 1)
    assert module.mean.tolist() == [2.5, 3.5]
    assert module.wide.item() == 1.1
    assert module.seen.item() == 8
    assert module.scratch.tolist() == [1, 1, 1]


def test_a_buffer_that_was_replaced_is_found():
    module = Statistics()
    buffers = Buffers(module)
    module.mean = module.mean * 2
    assert buffers.gather()[0].tolist()[:2] == [3, 5]
    buffers.scatter(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    assert module.mean.tolist() == [0, 0]


def test_a_module_without_persistent_buffers_has_none():
    module = nn.Linear(2, 2)
    module.register_buffer("scratch", torch.ones(3), persistent=False)
    assert not Buffers(module)


def test_a_digest_is_of_every_bit():
    vector = torch.tensor([0.0, 1.0])
    others = [torch.tensor([-0.0, 1.0]), vector.flip(0), vector.bfloat16(), torch.nextafter(vector, torch.ones(2) * 2)]
    assert len({digest(vector), *map(digest, others)}) == 5
    assert digest(vector, vector) != digest(vector)
    assert len(digest(torch.tensor(3.0), torch.zeros(0), torch.tensor([True]), torch.zeros(0, 3))) == 8, "any tensor"
