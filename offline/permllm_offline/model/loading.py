"""Load models: a dense Hugging Face checkpoint or a permllm one, local or hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm_offline.errors import OfflineError, first_line
from permllm_offline.model.heads import attention_options
from permllm_offline.model.language_model import (
    LanguageModel,
    language_model_of,
    may_hold_more,
)
from permllm_offline.run.local_path import local_path
from permllm_vllm.checkpoint.companions import module_folders
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.headers import natural_order
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.shards import (
    INDEX_NAME,
    SINGLE_NAME,
    read_weight_map,
    require_one_set,
)
from permllm_vllm.checkpoint.stored_files import StoredFiles

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_MORE_OUTPUTS = ("output_router_logits", "output_hidden_states", "output_attentions")
"""What a configuration may ask of every forward pass, and nobody reads here."""
TRUST_NOTHING: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""Of a folder: no code of the model's own, no download of what it names."""
_OWN_LAYERS: dict[str, Any] = {**TRUST_NOTHING, "use_kernels": False}
"""Of a model: nor of kernels from the hub, which transformers takes by default from 5.25 on."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A model on disk: the name the user gave, its folder, and the language model in it."""

    name: str
    directory: Path
    language: LanguageModel

    @property
    def config(self) -> Any:
        """The transformers configuration of the language model."""
        return self.language.config

    @property
    def commit(self) -> str | None:
        """The commit of a model of the hub, which its folder in the hub's cache is named by."""
        cached = self.directory.parent.name == "snapshots"
        return self.directory.name if cached and _COMMIT.fullmatch(self.directory.name) else None

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that the checkpoint declares, else that of its first floating-point tensor.

        As Transformers chooses; float32 where there is no such tensor.
        """
        dtype: torch.dtype = getattr(self.config, "dtype", None) or self._stored_dtype()
        return dtype

    def _stored_dtype(self) -> torch.dtype:
        try:
            files = StoredFiles(self.directory)
            # Beside weights of few bits are scales, of a dtype of their own.
            weights = natural_order(name for name in files.names() if name.endswith(".weight"))
            stored = (files.header(name).dtype for name in weights)
            return next((DTYPES[dtype] for dtype in stored if dtype in DTYPES), torch.float32)
        except CheckpointError:
            return torch.float32  # a folder without weights

    def reader(self) -> CheckpointReader:
        """Open the checkpoint."""
        return CheckpointReader(self.directory)

    def weight_files(self) -> list[Path]:
        """List the files that the weights are read from; raises CheckpointError without any."""
        files = set(read_weight_map(self.directory).values())
        return sorted(self.directory / file for file in files)


def open_source(model: str, check_config: Callable[[Any], None] = lambda config: None) -> Source:
    """Find a model: a local folder, or a hub name (downloaded to the hub's cache).

    Args:
        model: its folder or name.
        check_config: of its transformers configuration; what it raises comes before weights are
            downloaded.

    Raises:
        OfflineError: no such folder, unreachable hub, or no readable ``config.json``.
        CheckpointError: a model of the hub, or one with more than a language model, without
            weights or with a damaged index of these; a folder with two sets of weights.
    """
    from transformers import AutoConfig

    directory = _folder_of(model)
    try:
        config = AutoConfig.from_pretrained(directory, **TRUST_NOTHING)
    except Exception as error:  # transformers raises too many kinds to list
        raise OfflineError(
            f"{model!r} has no readable config.json ({first_line(error)}). Give a folder that "
            "holds a Hugging Face checkpoint, or a hub name."
        ) from error
    check_config(config)
    if local_path(model).is_dir():
        require_one_set(directory)
    else:
        directory = _with_weights(model, directory)
    tensors = read_weight_map(directory) if may_hold_more(config) else ()
    return Source(model, directory, language_model_of(config, tensors))


def load_model(source: Source, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a causal language model for inference, dense whatever the checkpoint holds.

    A permllm checkpoint is decompressed with its zeros in place; rows that a fold moved stay
    moved, which is the same function.

    Raises:
        OfflineError, CheckpointError: a checkpoint that cannot be loaded.
    """
    reader, names = source.reader(), source.language.names
    tensors = (
        (own, tensor)
        for name, tensor in reader.dense_state_dict(wanted=lambda name: names.own(name) is not None)
        if (own := names.own(name)) is not None
    )
    model, unexpected = model_from(source, source.config, tensors, dtype)
    if unexpected and reader.quantization is not None:
        raise _other_tensors(source, unexpected=unexpected)
    model.requires_grad_(False)
    return model.to(device).eval()


def load_served(source: Source, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a model for inference, its sparse layers multiplied as vLLM would.

    Beside a bfloat16 model of int8 values, kernels may round activations to 8 bits, which the
    weights of ``load_model`` do not show. Transformers maps the files of a permllm checkpoint into
    memory here.
    """
    if source.reader().quantization is None:
        return load_model(source, dtype, device)
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    import permllm_vllm.hf  # noqa: F401  (loads permllm checkpoints in transformers)

    kind = AutoModelForMultimodalLM if source.language.is_inside else AutoModelForCausalLM
    with _load_errors_named(source):
        model = kind.from_pretrained(
            source.directory,
            dtype=dtype,
            use_safetensors=True,
            **attention_options(source.config),
            **_OWN_LAYERS,
        )
    model.requires_grad_(False)
    return model.to(device).eval()


def model_from(
    source: Source, config: Any, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """Build a causal language model of a configuration around tensors that were read.

    Transformers would map the files into memory, where one that shrinks ends the process. The
    tensors become the model's own, without a copy.

    Args:
        source: for its name and its generation config.
        config: of transformers; its quantization is left out.
        tensors: of the dense model, each read when it is asked for.
        dtype: of the model; what its class keeps in float32 has that.

    Returns:
        The model on the CPU, and the names that it has no place for.

    Raises:
        OfflineError, CheckpointError: tensors that are missing or do not fit.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    from permllm_vllm.hf.experts import with_separate_experts
    from permllm_vllm.hf.precision import as_loaded

    config = deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name in _MORE_OUTPUTS:
        if getattr(config, name, False):
            setattr(config, name, False)
    with _load_errors_named(source):
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False, **attention_options(config)
            )
        model, found = with_separate_experts(type(empty)).from_pretrained(
            None,
            config=empty.config,
            state_dict={name: as_loaded(empty, name, tensor, dtype) for name, tensor in tensors},
            dtype=dtype,
            output_loading_info=True,
            **_OWN_LAYERS,
        )
        model.__class__ = type(empty)
        if found["missing_keys"]:
            raise _other_tensors(source, missing=sorted(found["missing_keys"]))
        if (source.directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(
                source.directory, local_files_only=True
            )
    return model, sorted(found["unexpected_keys"])


@contextmanager
def _load_errors_named(source: Source) -> Iterator[None]:
    """Turn a failure to load a model into an OfflineError."""
    try:
        yield
    except (OfflineError, CheckpointError):
        raise
    except Exception as error:  # transformers raises too many kinds to list
        raise OfflineError(
            f"cannot load {source.name!r}: {first_line(error)}. Fetch the model again, and check "
            "that its config.json belongs to its weights."
        ) from error


def _other_tensors(
    source: Source, missing: Sequence[str] = (), unexpected: Sequence[str] = ()
) -> OfflineError:
    return OfflineError(
        f"{source.name!r} does not hold the tensors of its architecture (missing: "
        f"{list(missing[:3])}, unexpected: {list(unexpected[:3])}). Fetch it again, or write it "
        "again with `save_pretrained` or `permllm-offline prune`."
    )


def parse_dtype(name: str) -> torch.dtype | None:
    """Return the dtype of ``--dtype``; None for ``auto``, i.e. what the checkpoint declares."""
    if name == "auto":
        return None
    if name not in DTYPES:
        raise OfflineError(f"dtype {name!r} is not supported: give auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def written_dtype(source: Source, name: str, option: str = "--dtype") -> torch.dtype:
    """Return the dtype in which a checkpoint of a model is written.

    Args:
        source: the model.
        name: as for ``parse_dtype``; ``auto`` is the model's own.
        option: by which the user names another one.

    Raises:
        OfflineError: an unknown name, or a model of a dtype that no checkpoint holds.
    """
    dtype = parse_dtype(name) or source.dtype
    if dtype not in DTYPES.values():
        raise OfflineError(
            f"{source.name!r} is of dtype {dtype_name(dtype)} by its config.json, which no "
            f"checkpoint holds: give {option} {' or '.join(DTYPES)}."
        )
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as checkpoints write it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def parse_device(name: str) -> torch.device:
    """Return the device of ``--device``; raises OfflineError where it cannot hold a tensor.

    Importances are added up in float64, which Apple's GPUs have not.
    """
    try:
        device = torch.device(name)
        # The device meta makes tensors that hold nothing.
        torch.zeros(1, dtype=torch.float64, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise OfflineError(
            f"device {name!r} cannot be used ({first_line(error)}). Give cpu, or a device that "
            "this build of torch supports."
        ) from error
    return device


_BESIDE_WEIGHTS = (
    *("*.json", "*.jinja", "*.model", "*.txt"),
    *("README.md", "LICENSE*", "LICENCE*", "NOTICE*"),
)
"""Files of a model on the hub that are fetched first: what is read beside the weights, and what its
licence says."""


def is_hub_name(model: str) -> bool:
    """Whether a repository on the hub may have that name."""
    return _HUB_NAME.fullmatch(model) is not None


def _folder_of(model: str) -> Path:
    """The folder of a model, or in the hub's cache with all but weights."""
    directory = local_path(model)
    if directory.is_dir():
        return directory
    if directory.exists() or not is_hub_name(model):
        raise OfflineError(
            f"{model!r} is not a folder. Give a folder that holds a Hugging Face checkpoint, or a "
            "hub name like owner/name."
        )
    return _fetch(model, _BESIDE_WEIGHTS)


def _with_weights(model: str, directory: Path) -> Path:
    weights = {SINGLE_NAME}
    if (directory / INDEX_NAME).exists():
        weights = set(read_weight_map(directory).values())
    for folder in module_folders(directory):  # what an embedding model has behind it
        weights |= {f"{folder.name}/*.safetensors", f"{folder.name}/*.bin"}
    # The folder is named by the commit: the weights are of the same one.
    return _fetch(model, sorted(weights), revision=directory.name)


def hub_remedy(error: Exception) -> str:
    """What helps where the hub gave no model."""
    from huggingface_hub.errors import GatedRepoError

    if any(isinstance(one, GatedRepoError) for one in (error, error.__cause__)):
        return "Accept the model's licence on its page there, and log in with `hf auth login`."
    return "Check the name, or give a folder; for a private model, `hf auth login`."


def _fetch(model: str, files: Sequence[str], revision: str | None = None) -> Path:
    """Fetch files of a model on the hub by their names, or patterns of these."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(files), revision=revision))
    except Exception as error:  # the hub client raises too many kinds to list
        raise OfflineError(
            f"{model!r} is neither a local folder nor could it be fetched from the Hugging Face "
            f"hub ({first_line(error)}). {hub_remedy(error)}"
        ) from error
