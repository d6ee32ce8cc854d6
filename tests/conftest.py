"""Fixtures of several files, and one thread for each test process: the models are so small here that more of them only
wait for each other."""

import os

import pytest
import torch
from command_runs import make_folder

import train_vit

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the scripts that tests start


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """24 images of 24 pixels, which no test may change: 22 train, 2 validate."""
    return make_folder(tmp_path_factory.mktemp("data") / "my photos", 24)


@pytest.fixture
def untested(monkeypatch):
    """Trainings end with their last step: no test, no pictures, no result.json."""
    monkeypatch.setattr(train_vit, "finish", lambda run, history, seconds: None)


@pytest.fixture(autouse=True)
def float32_unless_asked(monkeypatch):
    """amp="auto" is float32, also on a CPU that multiplies bfloat16, so that what is compared is the same anywhere."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
