"""What the tests of this folder compare with."""

import pytest

from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome, federate
from tests.faults.test_kills import make_config


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> Outcome:
    """The run of test_kills.py that nothing happens to; where a test has other settings, its file has its own."""
    return federate(make_config(tiny_config, tmp_path_factory.mktemp("undisturbed")))
