"""Requests for a link over a group that cannot be met."""

import pytest

import thinwire


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"within": object()}, "join: within without across"),
        ({"across": object()}, "join: across before torch.distributed is initialised"),
        ({"across": object(), "address": "127.0.0.1:29500"}, "join: across with address '127.0.0.1:29500'"),
    ],
)
def test_groups_are_of_a_process_group_that_is_there(options, text):
    with pytest.raises(thinwire.ConfigError, match=text) as error, thinwire.join(**options):
        pass
    assert 'join(across=mesh["across"], within=mesh["within"])' in str(error.value)
