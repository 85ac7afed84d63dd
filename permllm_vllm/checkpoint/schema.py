"""`quantization_config` of `config.json`, and the names, shapes and dtypes of the tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from permllm_vllm.checkpoint.errors import Problem, raise_if_any
from permllm_vllm.checkpoint.ignoring import REGEX_PREFIX, check_entries, matches
from permllm_vllm.checkpoint.int4 import GROUP
from permllm_vllm.checkpoint.pattern import Pattern

FORMAT_VERSIONS = (1, 2)
QUANT_METHOD = "permllm"
BLOCK_SIZES = (32, 64, 128)
DISTRIBUTION = "permllm-vllm"

WEIGHT_PACKED = "weight_packed"
WEIGHT_MASK = "weight_mask"
INPUT_PERMUTATION = "input_permutation"
FOLDED_PERMUTATION = "folded_permutation"
WEIGHT_SCALE = "weight_scale"
WEIGHT_MULTIPLIER = "weight_multiplier"
BIAS = "bias"
SPARSE_KINDS = (
    WEIGHT_PACKED,
    WEIGHT_MASK,
    INPUT_PERMUTATION,
    FOLDED_PERMUTATION,
    WEIGHT_SCALE,
    WEIGHT_MULTIPLIER,
)
"""Tensors that only a sparse layer has; `bias` is shared with dense layers."""

OPTIONAL = ("absent", "smoothed")
"""Keys of the configuration that checkpoints leave out where they would say nothing."""

ListKey = Literal["ignore", "runtime_permuted", "folded", "absent"]

VALUE_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "int4": torch.uint8,
}
"""Dtype of `weight_packed`; of int4 values, two are in each element."""

VALUE_KINDS = {
    "int8": (WEIGHT_PACKED, WEIGHT_SCALE),
    "int4": (WEIGHT_PACKED, WEIGHT_MULTIPLIER, WEIGHT_SCALE),
}
"""Tensors that hold the values of a layer together, where they are more than `weight_packed`."""


def computed_dtype(value_dtype: str) -> torch.dtype:
    """Return the dtype of the values once they are read: int4 values are int8 then."""
    return torch.int8 if value_dtype == "int4" else VALUE_DTYPES[value_dtype]


def value_kinds(value_dtype: str) -> tuple[str, ...]:
    """Return the kinds of tensors that hold the values of a sparse layer."""
    return VALUE_KINDS.get(value_dtype, (WEIGHT_PACKED,))


def version_of(value_dtype: str) -> int:
    """Return the oldest version of the format that has such values, which a checkpoint gets."""
    return 2 if value_dtype == "int4" else 1


def installed_version() -> str:
    """Return the version of this distribution, or "unknown" when it runs from a bare checkout."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"


class QuantizationConfig(BaseModel):
    """The `quantization_config` of a checkpoint; `format_version` follows from `value_dtype`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    quant_method: Literal["permllm"] = "permllm"
    format_version: Literal[1, 2] = 1  # by default that of the values
    pattern: str
    block_size: int
    value_dtype: Literal["bfloat16", "float16", "float32", "int8", "int4"]
    ignore: list[str] = Field(default_factory=list)
    runtime_permuted: list[str] = Field(default_factory=list)
    folded: list[str] = Field(default_factory=list)
    absent: list[str] = Field(default_factory=list)
    smoothed: bool = False
    tool_version: str = Field(default_factory=installed_version)

    _listed: dict[str, frozenset[str]] = PrivateAttr()
    _regexes: list[str] = PrivateAttr()

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> QuantizationConfig:
        """Read what `to_dict` wrote; raises `CheckpointError` that lists every problem."""
        raise_if_any(config_problems(entries))
        return cls.model_validate(dict(entries))

    def to_dict(self) -> dict[str, Any]:
        """Return the plain dictionary that goes into `config.json`."""
        entries = self.model_dump()
        return {key: value for key, value in entries.items() if value or key not in OPTIONAL}

    def model_post_init(self, context: Any) -> None:
        """Look names up in sets: mixtures of experts list tens of thousands of them."""
        lists = {"ignore": self.ignore, "runtime_permuted": self.runtime_permuted}
        lists |= {"folded": self.folded, "absent": self.absent}
        self._listed = {key: frozenset(names) for key, names in lists.items()}
        self._regexes = [entry for entry in self.ignore if entry.startswith(REGEX_PREFIX)]

    def lists(self, key: ListKey, module_name: str) -> bool:
        """Tell whether one of the lists has this name in full."""
        return module_name in self._listed[key]

    def is_ignored(self, module_name: str) -> bool:
        """Tell whether `ignore` leaves this Hugging Face module dense."""
        return self.lists("ignore", module_name) or any(
            matches(entry, module_name) for entry in self._regexes
        )

    def with_ignored(self, modules: Iterable[str]) -> QuantizationConfig:
        """Return the same with those of the modules in `ignore`, in full, that it leaves dense."""
        new = [name for name in modules if name not in self._listed["ignore"]]
        ignored = [name for name in new if self.is_ignored(name)]
        return self.model_validate(self.to_dict() | {"ignore": [*self.ignore, *ignored]})

    def renamed(self, rename: Callable[[list[str]], list[str]]) -> QuantizationConfig:
        """Return the same with other names of modules; regular expressions stay as they are."""
        exact = [name for name in self.ignore if name not in self._regexes]
        return self.model_validate(
            self.to_dict()
            | {
                "ignore": [*rename(exact), *self._regexes],
                "runtime_permuted": rename(self.runtime_permuted),
                "folded": rename(self.folded),
                "absent": rename(self.absent),
            }
        )

    @model_validator(mode="before")
    @classmethod
    def _version_of_its_values(cls, entries: Mapping[str, Any]) -> dict[str, Any]:
        return {"format_version": version_of(str(entries.get("value_dtype"))), **entries}

    @field_validator("pattern")
    @classmethod
    def _pattern_is_supported(cls, text: str) -> str:
        return str(Pattern.parse(text))

    @field_validator("block_size")
    @classmethod
    def _block_size_is_supported(cls, size: int) -> int:
        if size not in BLOCK_SIZES:
            raise ValueError(f"block_size is one of {', '.join(map(str, BLOCK_SIZES))}")
        return size

    @field_validator("ignore")
    @classmethod
    def _regexes_compile(cls, entries: list[str]) -> list[str]:
        check_entries(entries)
        return entries

    @field_validator("runtime_permuted", "folded", "absent")
    @classmethod
    def _modules_are_listed_once(cls, modules: list[str]) -> list[str]:
        if len(set(modules)) < len(modules):
            [(twice, _)] = Counter(modules).most_common(1)
            raise ValueError(f"{twice!r} is listed twice; a module is listed once")
        return modules

    @model_validator(mode="after")
    def _version_has_the_values(self) -> QuantizationConfig:
        version = version_of(self.value_dtype)
        if self.format_version != version:
            raise ValueError(
                f"format_version is {self.format_version}, but {self.value_dtype} values are of "
                f"version {version}"
            )
        return self

    @model_validator(mode="after")
    def _one_permutation_per_module(self) -> QuantizationConfig:
        both = sorted(set(self.runtime_permuted) & set(self.folded))
        if both:
            raise ValueError(
                f"{both[0]!r} is in runtime_permuted and in folded; a permutation is applied at "
                "run time or folded, never both"
            )
        return self


def is_of_this_format(config: Mapping[str, Any]) -> bool:
    """Tell whether a `config.json` calls its model one of this format, in whatever version."""
    entries = config.get("quantization_config")
    return isinstance(entries, Mapping) and entries.get("quant_method") == QUANT_METHOD


def config_problems(entries: object) -> list[Problem]:
    """List what is wrong with a `quantization_config`, without raising."""
    key = "config.json quantization_config"
    if not isinstance(entries, Mapping):
        return [Problem(key, type(entries).__name__, "a JSON object", "write the checkpoint again")]
    method, found_version = entries.get("quant_method"), entries.get("format_version")
    if method != QUANT_METHOD:
        return [
            Problem(
                f"{key}.quant_method",
                repr(method),
                f"this format is {QUANT_METHOD!r}",
                "use the tool that made this checkpoint, or prune its dense original with "
                "`permllm-offline prune`",
            )
        ]
    install = f"install a newer {DISTRIBUTION} from its source repository"
    known = " and ".join(map(str, FORMAT_VERSIONS))
    if type(found_version) is not int or found_version not in FORMAT_VERSIONS:  # nor True, nor 1.0
        newer = isinstance(found_version, int) and found_version > max(FORMAT_VERSIONS)
        return [
            Problem(
                f"{key}.format_version",
                repr(found_version),
                f"{DISTRIBUTION} {installed_version()} reads versions {known}",
                install if newer else "write the checkpoint again with `permllm-offline prune`",
            )
        ]
    problems = [
        Problem(f"{key}.{name}", "nothing", "every key is present", "write the checkpoint again")
        for name in QuantizationConfig.model_fields
        if name not in entries and name not in OPTIONAL
    ]
    try:
        QuantizationConfig.model_validate(dict(entries))
    except ValidationError as error:
        for detail in error.errors():
            if detail["type"] == "missing":
                continue
            path = ".".join(map(str, (key, *detail["loc"])))
            if detail["type"] == "extra_forbidden":
                rule = f"{DISTRIBUTION} {installed_version()} does not know this key"
                problems.append(Problem(path, repr(detail["input"]), rule, install))
            else:
                value = repr(detail["input"]) if detail["loc"] else "keys that disagree"
                rule = detail["msg"].removeprefix("Value error, ")
                problems.append(Problem(path, value, rule, "write the checkpoint again"))
    return problems


def tensor_shape(
    kind: str, out_features: int, in_features: int, pattern: Pattern, value_dtype: str
) -> tuple[int, ...]:
    """Return the shape of a tensor of a sparse layer `[out_features, in_features]`.

    `kind` is the last part of its name (`WEIGHT_PACKED`, ...); raises `KeyError` for others.
    """
    kept = in_features * pattern.kept // pattern.group
    return {
        WEIGHT_PACKED: (out_features, kept // 2 if value_dtype == "int4" else kept),
        WEIGHT_MASK: (out_features, in_features // 8),
        INPUT_PERMUTATION: (in_features,),
        FOLDED_PERMUTATION: (in_features,),
        WEIGHT_SCALE: (out_features,),
        WEIGHT_MULTIPLIER: (out_features, -(-in_features // GROUP)),
        BIAS: (out_features,),
    }[kind]


def tensor_dtype(kind: str, value_dtype: str) -> torch.dtype | None:
    """Return the dtype of a tensor of a sparse layer; None where any floating dtype will do."""
    return {
        WEIGHT_PACKED: VALUE_DTYPES[value_dtype],
        WEIGHT_MASK: torch.uint8,
        INPUT_PERMUTATION: torch.uint8,
        FOLDED_PERMUTATION: torch.uint8,
        WEIGHT_SCALE: torch.float32,
        WEIGHT_MULTIPLIER: torch.uint8,
        BIAS: None,
    }[kind]
