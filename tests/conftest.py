"""No test judges by the clock, and none draws other examples than the last time.

`make fuzz` is where new inputs are tried. Nor does one depend on the machine: prunes that name no
pattern are for a GPU, but where a test says something else.
"""

from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("unhurried", deadline=None, derandomize=True)
settings.load_profile("unhurried")


@pytest.fixture(scope="session", autouse=True)
def target() -> Iterator[None]:
    """This machine, in the process of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("permllm_vllm.diagnosis.target.detected", lambda: "gpu")
        yield
