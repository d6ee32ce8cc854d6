"""One thread for each test process: the models are so small here that more of them only wait for each other."""

import os

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the scripts that tests start


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
