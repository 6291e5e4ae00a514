"""Shared set-up: one thread per worker, as two workers would fight over two cores; a width."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch):
    """Tables are as wide in every terminal that tests are started from, and where there is none."""
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same state of torch's global generator."""
    torch.manual_seed(0)


@pytest.fixture
def forget_accelerate():
    """Lets the next use of accelerate be of another kind; it keeps what the first of a process was.

    The function is called before the test and after it, and is there to be called in between.
    """
    state = pytest.importorskip("accelerate.state")

    def forget():
        for kept in (state.AcceleratorState, state.GradientState, state.PartialState):
            kept._reset_state()

    forget()  # what other tests of this process have left, those of the documentation too
    yield forget
    forget()
