"""Settings for the whole suite, made before any framework is imported."""

import os

# Two cores and many small matrices: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(autouse=True)
def settings_of_the_test_alone():
    """Old transformers leave a run's precision and compiler in the environment, for the next one to take."""
    before = {name for name in os.environ if name.startswith("ACCELERATE_")}
    yield
    for name in {name for name in os.environ if name.startswith("ACCELERATE_")} - before:
        del os.environ[name]


@pytest.fixture
def checkpoints_of_old_releases():
    """Old transformers keep NumPy's random state where new torch asks for permission to unpickle it."""
    import numpy as np
    import torch

    state_types = [np.ndarray, np.dtype, np.dtypes.UInt32DType, np.random.get_state()[1].__reduce__()[0]]
    with torch.serialization.safe_globals(state_types):
        yield
