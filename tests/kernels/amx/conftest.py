import pytest

from tests.kernels.amx.emulated import Emulation, emulation_at
from tests.kernels.amx.operators import EmulatedOperators


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return emulation_at(tmp_path_factory.mktemp("amx") / "libemulation.so")


@pytest.fixture
def isa(emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> str:
    """amx, in place of every instruction set of this CPU: served by the emulation."""
    EmulatedOperators(emulation).install(monkeypatch)
    return "amx"
