"""One group of four processes for all tests of islands: starting them is what takes time."""

import pytest
from test_torch_link import members as start_members


@pytest.fixture(scope="session")
def quad(tmp_path_factory):
    return start_members("quad", tmp_path_factory.mktemp("quad"), 4, program="islands/island_member.py")[0]
