import math

import pytest
import torch

from thinwire.errors import ConfigError
from thinwire.train.gpt import GPT, SIZES, gpt, next_token_loss


def small(**options):
    torch.manual_seed(0)
    return GPT(32, 12, 2, 2, 16, **options)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_later_token_does_not_change_earlier_logits():
    """Causality; equality, because the earlier rows see the same numbers in the same order."""
    model = small()
    tokens = torch.arange(24).view(2, 12)
    changed = tokens.clone()
    changed[:, 7:] = 31
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_an_earlier_token_changes_later_logits():
    model = small()
    tokens = torch.arange(12).view(1, 12)
    changed = tokens.clone()
    changed[0, 0] = 31
    assert not torch.equal(model(tokens)[:, -1], model(changed)[:, -1])


def test_the_order_of_earlier_tokens_matters():
    model = small()
    assert not torch.equal(model(torch.tensor([[1, 2, 3]]))[:, -1], model(torch.tensor([[2, 1, 3]]))[:, -1])


def test_a_tied_head_is_the_embedding():
    tied, untied = small(tied=True), small(tied=False)
    assert tied.head.weight is tied.embed.weight
    assert untied.head.weight is not untied.embed.weight
    assert count(untied) - count(tied) == 32 * 16


def test_the_seed_decides_the_weights():
    one, other = small(), small()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    torch.manual_seed(1)
    assert not torch.equal(GPT(32, 12, 2, 2, 16).embed.weight, one.embed.weight)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("0.2M", 224_640),
        ("0.9M", 842_496),
        ("3M", 2_743_296),
        ("10M", 9_987_200),
        ("30M", 29_144_192),
    ],
)
def test_the_sizes_have_the_parameters_their_names_say(size, parameters):
    with torch.device("meta"):
        model = gpt(size, vocab=256, context=128)
    w, layers = SIZES[size].width, SIZES[size].layers
    blocks = layers * (12 * w * w + 13 * w)  # four matrices of w^2 in attention, eight in the MLP; biases and norms
    assert count(model) == parameters == blocks + (256 + 128) * w + 2 * w
    assert float(size.removesuffix("M")) * 1e6 == pytest.approx(parameters, rel=0.13)  # names have one or two digits


def test_124m_is_gpt2_small():
    with torch.device("meta"):
        assert count(gpt("124M", vocab=50257, context=1024)) == 124_439_808
    assert set(SIZES) == {"0.2M", "0.9M", "3M", "10M", "30M", "124M"}


def test_a_fresh_model_knows_nothing():
    """The loss starts near that of the uniform distribution: small weights give nearly equal logits."""
    torch.manual_seed(0)
    model = gpt("0.2M", vocab=256, context=32)
    tokens = torch.arange(256).view(8, 32)
    assert next_token_loss(model(tokens), tokens.flip(0)).item() == pytest.approx(math.log(256), abs=0.1)


def test_residual_matrices_start_smaller():
    """std 0.02 / sqrt(2 layers); 5 % is five standard errors of the estimate from 16384 draws or more."""
    torch.manual_seed(0)
    model = gpt("0.9M", vocab=256, context=32)
    assert model.blocks[0].attention.write.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert model.blocks[3].mlp_write.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert model.blocks[0].attention.read.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_loss_is_the_mean_surprise():
    logits = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0]]])
    targets = torch.tensor([[1, 0]])
    assert next_token_loss(logits, targets).item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2, rel=1e-6)
    assert next_token_loss(logits.bfloat16(), targets).dtype == torch.float32


def test_too_many_tokens_are_refused():
    with pytest.raises(ConfigError, match="GPT: 13 tokens in a row\n  expected  at most the context, 12"):
        small()(torch.zeros(1, 13, dtype=torch.long))


def test_a_width_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="GPT: width 10 does not divide among 4 heads"):
        GPT(8, 8, 1, 4, 10)
