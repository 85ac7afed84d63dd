import pytest

from tests.kernels.amx.emulated import Emulation, emulation_at


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return emulation_at(tmp_path_factory.mktemp("amx") / "libemulation.so")
