import pytest
import torch

from tests.fuse.world import fake_world


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """One thread for a module's shared runs and for its tests alike: with another number sums round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def world():
    return fake_world()
