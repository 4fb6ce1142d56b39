"""Settings for the whole suite, made before any framework is imported."""

import os
import sys

# Two cores and many small matrices: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

SETTINGS_AT_THE_START = {name for name in os.environ if name.startswith("ACCELERATE_")}


def forget_settings():
    for name in {name for name in os.environ if name.startswith("ACCELERATE_")} - SETTINGS_AT_THE_START:
        del os.environ[name]
    # Old TRL, once its GRPO was imported, has old transformers ask every trainer's arguments for this field.
    asked_for = getattr(sys.modules.get("transformers.training_args"), "_VALID_DICT_FIELDS", [])
    if "model_init_kwargs" in asked_for:
        asked_for.remove("model_init_kwargs")


@pytest.fixture(autouse=True)
def settings_of_the_test_alone():
    """Old transformers leave a run's precision and compiler in the environment, for the next one to take."""
    # Also those of runs that fixtures for several tests have made.
    forget_settings()
    yield
    forget_settings()


@pytest.fixture
def checkpoints_of_old_releases():
    """Old transformers keep NumPy's random state where new torch asks for permission to unpickle it."""
    import numpy as np
    import torch

    rebuild = np.random.get_state()[1].__reduce__()[0]
    # Under the name that NumPy 2 gave it, too: NumPy 1 reads such checkpoints.
    named = (rebuild, "numpy._core.multiarray._reconstruct")
    state_types = [np.ndarray, np.dtype, np.dtypes.UInt32DType, rebuild, named]
    with torch.serialization.safe_globals(state_types):
        yield
