"""`register` and the compatibility module: vLLM never suffers from us."""

import importlib
import importlib.util
import logging
import re
import sys
from importlib.metadata import entry_points

import pytest
import vllm.version
from vllm.model_executor.layers import linear, quantization
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

from permllm_vllm import compat, plugin

CONFIG_MODULE = "permllm_vllm.quantization.config"


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged as a warning: vLLM's loggers do not propagate to pytest's."""
    messages: list[str] = []
    logger = logging.getLogger("vllm.permllm")
    monkeypatch.setattr(logger, "warning", lambda text, *args: messages.append(text % args))
    return messages


def test_register_is_idempotent(warnings: list[str]) -> None:
    for _ in range(3):
        plugin.register()
    assert QUANTIZATION_METHODS.count("permllm") == 1
    assert linear.WEIGHT_LOADER_V2_SUPPORTED.count("PermLLMLinearMethod") == 1
    assert get_quantization_config("permllm").__name__ == "PermLLMConfig"
    assert warnings == []


@pytest.mark.parametrize("error", [ImportError("no such thing"), RuntimeError("any other")])
def test_register_never_raises(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str], error: Exception
) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == CONFIG_MODULE:
                raise error

    monkeypatch.delitem(sys.modules, CONFIG_MODULE, raising=False)
    monkeypatch.delattr(importlib.import_module("permllm_vllm.quantization"), "config", False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})
    plugin.register()
    assert len(warnings) == 1
    assert "could not be registered" in warnings[0]
    assert str(error) in warnings[0]
    with pytest.raises(ImportError, match=f"could not be registered .*{error}"):
        get_quantization_config("permllm").from_config({"quant_method": "permllm"})


def test_a_vllm_without_a_symbol(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    """Such a vLLM serves everything else, and says what is missing when it is asked for us."""
    methods: dict[str, type] = {}
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", methods)
    monkeypatch.delattr(linear, "LinearMethodBase")
    for name in [name for name in sys.modules if name.startswith("permllm_vllm")]:
        monkeypatch.delitem(sys.modules, name)
    plugin.register()
    missing = "has no vllm.model_executor.layers.linear.LinearMethodBase, which PermLLM needs"
    assert missing in warnings[0]
    with pytest.raises(ImportError, match=re.escape(missing)) as error:
        methods["permllm"].from_config({"quant_method": "permllm"})
    assert "Install vLLM" in str(error.value)


def test_a_vllm_without_quantization(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    """Not even the refusal can be registered then: vLLM still starts."""
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.quantization", None)
    for name in [name for name in sys.modules if name.startswith("permllm_vllm")]:
        monkeypatch.delitem(sys.modules, name)
    plugin.register()
    assert "which PermLLM needs" in warnings[0]


def test_a_missing_symbol_is_named() -> None:
    with pytest.raises(compat.IncompatibleVllmError) as error:
        compat._symbol("vllm.model_executor.layers.linear", "NoSuchLinear")
    for part in ("vllm.model_executor.layers.linear.NoSuchLinear", ">=0.32", "<0.35"):
        assert part in str(error.value)
    assert compat.installed_version() in str(error.value)
    compat.SYMBOLS.pop()


def test_a_missing_module_is_named() -> None:
    with pytest.raises(compat.IncompatibleVllmError, match=r"no vllm\.no_such_module\.Anything"):
        compat._symbol("vllm.no_such_module", "Anything")
    compat.SYMBOLS.pop()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1", "0.34.0", "0.34.1rc1"])
def test_tested_versions(version: str) -> None:
    assert compat.untested_version_warning(version) is None


@pytest.mark.parametrize("version", ["0.31.2", "0.35.0", "1.0", "dev", "unknown"])
def test_other_versions_are_warned_about(version: str) -> None:
    warning = compat.untested_version_warning(version)
    assert warning is not None
    assert version in warning
    assert "0.32" in warning


@pytest.mark.parametrize(("version", "warned"), [("0.32.0", 0), ("0.99.0", 1)])
def test_an_untested_vllm_is_used_all_the_same(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str], version: str, warned: int
) -> None:
    monkeypatch.setattr(vllm.version, "__version__", version)
    spec = importlib.util.spec_from_file_location("another_compat", compat.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(warnings) == warned
    assert all("the installed vLLM is 0.99.0: it may work" in text for text in warnings)
    assert module.LinearMethodBase is compat.LinearMethodBase


def test_vllm_finds_the_entry_point() -> None:
    found = [
        point for point in entry_points(group="vllm.general_plugins") if point.name == "permllm"
    ]
    if not found:
        pytest.skip("permllm-vllm is not installed: run `make install`")
    assert found[0].load() is plugin.register
