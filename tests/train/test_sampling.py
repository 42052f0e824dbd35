import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.train.sampling import epoch_positions, held_out, permutation, uniform

keys = st.integers(0, 2**64 - 1)


@given(keys, st.integers(0, 40), st.integers(1, 1000))
def test_uniform_is_in_range_and_a_function_of_the_key(key, count, below):
    drawn = uniform(key, count, below)
    assert drawn.shape == (count,)
    assert ((drawn >= 0) & (drawn < below)).all()
    assert torch.equal(drawn, uniform(key, count, below))


def test_uniform_reaches_everything_about_equally():
    """10 bins of 1000 expected draws: 5 standard deviations are 150."""
    counts = uniform(7, 10_000, 10).bincount(minlength=10)
    assert ((counts - 1000).abs() < 150).all()


@given(keys, st.integers(1, 50))
def test_a_permutation_has_every_number_once(key, n):
    assert torch.equal(permutation(key, n).sort().values, torch.arange(n))


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 30))
def test_together_the_members_see_every_sample_once_an_epoch(world, batch_size, n):
    """Three epochs of the endless row, whatever the batches' size: each epoch is a permutation."""
    steps = -(-3 * n // (world * batch_size))
    row = torch.cat(
        [
            epoch_positions(5, step, rank, world, batch_size=batch_size, n=n)
            for step in range(steps)
            for rank in range(world)
        ]
    )
    for epoch in row[: 3 * n].view(3, n):
        assert torch.equal(epoch.sort().values, torch.arange(n))


def test_epochs_and_seeds_have_different_orders():
    def order(seed, step):
        return epoch_positions(seed, step, 0, 1, batch_size=50, n=50)

    assert not torch.equal(order(0, 0), order(0, 1))
    assert not torch.equal(order(0, 0), order(1, 0))
    assert torch.equal(order(0, 3), order(0, 3))


@given(st.integers(2, 200))
def test_what_is_held_out_is_not_trained_on(n):
    train, valid = held_out(n, 0.2)
    assert len(valid) == max(1, int(0.2 * n))
    assert torch.equal(torch.cat([train, valid]).sort().values, torch.arange(n))
