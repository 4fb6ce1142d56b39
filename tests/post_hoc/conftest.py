"""Finished runs, made once for all tests of this folder."""

import pytest
from post_hoc_runs import finish_run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return finish_run(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="session")
def adapter_run(tmp_path_factory):
    return finish_run(tmp_path_factory.mktemp("adapter"), is_adapter=True)
