"""The model card: README.md of a pruned checkpoint."""

from __future__ import annotations

from pathlib import Path

import yaml

from permllm_offline.model.loading import Source
from permllm_offline.preparation.method_parts import reads_activations, summary_of
from permllm_offline.report.published import public_name
from permllm_offline.report.report import Report
from permllm_offline.report.serve_command import serve_command
from permllm_offline.run.local_path import local_path

_UNKNOWN = "unknown"


def model_card(report: Report, source: Source, output_name: str) -> str:
    """Write the model card of a report.

    Args:
        report: of the prune.
        source: the dense base model; its own card names the licence.
        output_name: folder name of the checkpoint, for the serve line.
    """
    recipe, base = report.recipe, base_name(source)
    link = f"[{base}](https://huggingface.co/{base})" if "/" in base else base
    license_name = base_license(source.directory)
    header = {
        "base_model": base,
        "library_name": "vllm",
        "tags": ["permllm", "sparse", recipe.pattern],
    }
    if license_name != _UNKNOWN:
        header["license"] = license_name
    permuted = {"run time": 0, "folded": 0, "none": 0}
    for layer in report.layers:
        permuted[layer.permutation] += 1
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {output_name}

{link} pruned to {recipe.pattern} sparsity by
PermLLM for vLLM (`permllm-vllm` {report.tool_version}).

| | |
|---|---|
| base model | {base} |
| licence of the base model | {license_name} |
| method | `{recipe.method}`: {summary_of(recipe)} |
| reconstruction | {recipe.parsed_method().reconstruction} |
| pattern | {recipe.pattern}: {recipe.parsed_pattern().kept} of every \
{recipe.parsed_pattern().group} weights kept |
| values | {_values(report)} |
| pruned linear layers | {len(report.layers)} ({permuted["run time"]} permuted at run time, \
{permuted["folded"]} folded, {permuted["none"]} unpermuted) |
| bytes of the pruned layers | {report.byte_ratio:.1%} of dense |{_left_dense_row(report)}
| calibration | {calibration_text(report)} |
| perplexity, dense | {_perplexity(report.perplexity_before)} |
| perplexity, this checkpoint | {_perplexity(report.perplexity_after)} |

Perplexity is measured on windows of the calibration data set that calibration never saw\
{_activations_note(report)}.

## Serve

vLLM serves it with the plugin `permllm-vllm`. It is not on PyPI: install it from its source
directory, into the environment that has vLLM.

```bash
pip install --no-build-isolation ./permllm-vllm
{serve_command(output_name, source.config)}
```

`VLLM_CPU_KVCACHE_SPACE` is the KV cache of a CPU in GiB: without it vLLM takes 92 % of the memory,
and does not start where less is free. One request of `--max-model-len` tokens must fit into it: for
longer ones raise both. A GPU does not read the variable.

Transformers loads it after `import permllm_vllm.hf`; without that import it fills the pruned layers
with random numbers.

`recipe.yaml` holds every choice behind this checkpoint, `report.json` what happened to each layer,
`costs.json` the time and memory that it took; `report.html` shows all of it.
"""


def _activations_note(report: Report) -> str:
    """What perplexity does not count: kernels for int8 values round activations too."""
    rounded = any(layer.rounding_error is not None for layer in report.layers)
    return ", with activations as they are; serving rounds them" if rounded else ""


def dense_card(source: Source, output_name: str) -> str:
    """Write the model card of a checkpoint whose pruned weights are zeros.

    Args:
        source: the sparse checkpoint; its own card names the licence.
        output_name: folder name of the dense one.
    """
    license_name = base_license(source.directory)
    header = {"library_name": "transformers", "tags": ["sparse"]}
    if license_name != _UNKNOWN:
        header["license"] = license_name
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {output_name}

{base_name(source)} as a plain Hugging Face checkpoint: pruned weights are zeros, all channels are
in their original order. Written by `permllm-offline convert --to dense`.
"""


def base_name(source: Source) -> str:
    """Name of the base model that is not a path of this machine."""
    is_folder = local_path(source.name).is_dir()
    return source.directory.resolve().name if is_folder else source.name


def base_license(directory: Path) -> str:
    """Licence that the base model's own card declares, or ``unknown``."""
    card = directory / "README.md"
    if not card.is_file():
        return _UNKNOWN
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return _UNKNOWN
    try:
        header = yaml.safe_load(parts[1])
    except (yaml.YAMLError, ValueError):  # the latter for a date that does not exist
        return _UNKNOWN
    return str(header.get("license", _UNKNOWN)) if isinstance(header, dict) else _UNKNOWN


def _values(report: Report) -> str:
    errors = [layer.rounding_error for layer in report.layers if layer.rounding_error is not None]
    if not errors:
        return "as in the base model"
    said = "int8, one scale per row"
    if report.recipe.values == "int4":
        said = "int4, one scale per row and a multiplier for each 64 of its inputs"
    if report.recipe.smoothing and report.calibration is not None:
        said += ", with smoothed inputs"
    return f"{said}; {report.rounding_measure} {max(errors):.2%} at most"


def left_dense_text(report: Report) -> str:
    """Say how many linears stay dense by choice, and the entries that chose them."""
    entries = ", ".join(f"`{entry}`" for entry in report.recipe.ignore)
    return f"{len(report.left_dense)} linear layers: {entries}"


def _left_dense_row(report: Report) -> str:
    if not report.left_dense:
        return ""
    text = left_dense_text(report).replace("|", r"\|")  # which would end the cell
    return f"\n| left dense by choice | {text} |"


def calibration_text(report: Report) -> str:
    """Say what a prune was calibrated on, files by their names alone."""
    recipe, record = report.recipe, report.calibration
    if not (recipe.datasets and reads_activations(recipe)):
        return "none"
    names = ", ".join(f"`{public_name(name)}`" for name in recipe.datasets)
    text = f"{recipe.num_samples} windows of {recipe.sequence_length} tokens from {names}"
    if record is not None and record.own_windows:
        text += f", and {record.own_windows} that the base model wrote itself"
    return text


def _perplexity(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"
