"""signSGD with majority vote: a step of one size for all, in the direction that most members' gradients have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thinwire
from small import make_model, same, sgd, train
from thinwire.aggregators import Majority
from thinwire.codecs import feedback, sign
from thinwire.links.local import run
from thinwire.methods import every_step, sign_sgd


def moved(gradients: list[list[float]], method) -> torch.Tensor:
    """What a step of lr 1 does to a model at zero, of as many members as there are gradients."""

    def member(link):
        model = nn.Linear(len(gradients[0]), 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with thinwire.synchronize(model, optimizer, method, link):
            model.weight.grad = torch.tensor([gradients[link.rank]], dtype=torch.float32)
            optimizer.step()
        return model.weight.detach().view(-1)

    results = run(len(gradients), member)
    assert all(torch.equal(results[0], other) for other in results)
    return results[0]


def test_a_vote_by_hand():
    """Two against one, whatever the sizes; a tie of two and a gradient of zero count as positive."""
    assert moved([[1, -1, 9.0], [1, -1, -1], [-9, 9, -1]], sign_sgd()).tolist() == [-1, 1, 1]
    assert moved([[5.0, -5], [-1, -1]], sign_sgd()).tolist() == [-1, 1]
    assert moved([[0.0, -1]], sign_sgd()).tolist() == [-1, 1]


@pytest.mark.parametrize("block", [8, 1024])
def test_it_is_the_sign_of_the_sum_of_signs_in_training(block):
    """To the bit: the parts of the method against plain torch, three members, five steps."""
    from small import batch, loss_of

    ours = run(3, lambda link: train(link, sign_sgd(block=block), 5, make_optimizer=sgd))
    model = make_model()
    optimizer = sgd(model)
    for step in range(5):
        votes = [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(3):
            gradients = torch.autograd.grad(loss_of(model, *batch(step, rank)), list(model.parameters()))
            for vote, gradient in zip(votes, gradients, strict=True):
                vote += torch.where(gradient >= 0, 1.0, -1.0)
        for p, vote in zip(model.parameters(), votes, strict=True):
            p.grad = vote.sign()
        optimizer.step()
    assert same(ours[0].live, [p.detach() for p in model.parameters()])


def test_nothing_waits_and_the_parts_are_named():
    assert sign_sgd(block=64) == every_step(codec=feedback(sign(block=64), decay=0.0)).but(aggregator=Majority())
    twice = [moved([[3.0, 0.5, -2]], sign_sgd()) for _ in range(2)]
    assert torch.equal(*twice)
