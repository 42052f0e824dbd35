"""Shared by all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Bits must not depend on how many cores the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
