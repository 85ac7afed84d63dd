import pytest

from tests.kernels.amx.emulated import Emulation, compile_emulation


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return compile_emulation(tmp_path_factory.mktemp("amx") / "libemulation.so")
