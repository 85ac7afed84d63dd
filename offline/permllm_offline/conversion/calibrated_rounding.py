"""Round the kept values of a sparse model to integers, as text tells what its layers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from tqdm import tqdm

from permllm_offline.calibration.statistics import mean_norms, summed_squares
from permllm_offline.calibration.unreached_experts import (
    Unreached,
    count_unreached,
    warn_unreached,
)
from permllm_offline.conversion.integer_rounding import check_scale
from permllm_offline.conversion.sparse_model import SparseModel
from permllm_offline.model.float32_products import products_in_float32
from permllm_offline.model.loading import Source, parse_device
from permllm_offline.model.modules import linear_of
from permllm_offline.pruning.streamed_model import StreamedModel
from permllm_offline.pruning.streamed_windows import Flow, load_states, with_states
from permllm_offline.recipe.schema import Recipe
from permllm_offline.run.steps import Step, Work
from permllm_offline.sparsity.bake import divided_norms
from permllm_offline.sparsity.rounded_layer import RoundedLayer, Rounding, choose_grids
from permllm_offline.sparsity.smoothing import divided_by
from permllm_offline.sparsity.stored_grids import grid_tensors, grids_of
from permllm_vllm.checkpoint.errors import raise_if_any
from permllm_vllm.checkpoint.numbers import number_problems

_CALIBRATION = "calibration"
_NORM = "norm:"


@dataclass(frozen=True)
class CalibratedRounding:
    """The grids of all decoder layers, chosen with inputs in mind, and smoothed inputs.

    ``norms`` are divided, by the name of their module: int8 exponents [channels]. ``errors`` are
    the expected ones of each linear's output, relative to it, by its stored name.
    """

    values: Rounding
    layers: Sequence[RoundedLayer]
    norms: Mapping[str, Tensor]
    errors: Mapping[str, float]
    tokens: int
    error_of: str = "output"

    @property
    def smoothed(self) -> bool:
        """Whether any input is divided by another number than 1."""
        return any(layer.smoothed for layer in self.layers)

    @property
    def how(self) -> str:
        """Say how the values were rounded."""
        inputs = "smoothed" if self.smoothed else "as they were"
        return (
            f"with {self.tokens:,} tokens of calibration text: every scale has the least expected "
            f"error of the output, and inputs are {inputs}"
        )

    def divided(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that stays dense, divided where it is of a norm before smoothed inputs."""
        return divided_by(tensor, self.norms.get(name.rpartition(".")[0]))


@dataclass
class CalibratedLayers:
    """Grids of the first decoder layers, in order.

    ``norms`` are divided, by the name of their module: int8 exponents [channels].
    """

    rounded: list[RoundedLayer] = field(default_factory=list)
    norms: dict[str, Tensor] = field(default_factory=dict)
    unreached: list[Unreached] = field(default_factory=list)

    def add(self, rounded: RoundedLayer, norms: Mapping[str, Tensor], unreached: Unreached) -> None:
        """Append the next decoder layer."""
        self.rounded.append(rounded)
        self.norms |= norms
        self.unreached.append(unreached)

    def step(self) -> Step:
        """The same as a step that can be kept."""
        # The exponents of grids themselves, and a file takes no tensors that share memory.
        norms = {f"{_NORM}{name}": exponents.clone() for name, exponents in self.norms.items()}
        facts = {
            "errors": [dict(layer.errors) for layer in self.rounded],
            "unreached": [list(layer) for layer in self.unreached],
        }
        return Step(grid_tensors(self.rounded) | norms, facts)

    @classmethod
    def of(cls, step: Step) -> CalibratedLayers:
        """Read what ``step`` gave; states of the text may be among it."""
        norms = {
            name.removeprefix(_NORM): step.tensors[name]
            for name in step.tensors
            if name.startswith(_NORM)
        }
        unreached = [Unreached(*layer) for layer in step.facts["unreached"]]
        return cls(grids_of(step.tensors, step.facts["errors"]), norms, unreached)


def calibrate(
    model: SparseModel,
    source: Source,
    windows: Tensor,
    values: Rounding,
    recipe: Recipe,
    work: Work,
) -> CalibratedRounding:
    """Run text through a sparse model and choose the grids of its linears.

    One decoder layer is in memory at a time, and the states of the text. After each of them the
    work keeps what is needed to go on.

    Args:
        model: whose weights are sparse already.
        source: its configuration.
        windows: int64 [windows, sequence_length].
        values: to what it is rounded.
        recipe: for ``smoothing`` and ``device``.
        work: where finished layers are kept.

    Raises:
        OfflineError: a model that cannot be run, or values that have no scale in float32.
        CheckpointError: tensors that are damaged.
    """

    def pass_layers() -> Step:
        return _pass_layers(model, source, windows, values, recipe, work).step()

    passed = CalibratedLayers.of(work.step(_CALIBRATION, pass_layers))
    warn_unreached(passed.unreached)
    errors = {
        model.stored_name(index)(linear): error
        for index, layer in enumerate(passed.rounded)
        for linear, error in layer.errors.items()
    }
    return CalibratedRounding(values, passed.rounded, passed.norms, errors, windows.numel())


@products_in_float32()
def _pass_layers(
    model: SparseModel,
    source: Source,
    windows: Tensor,
    values: Rounding,
    recipe: Recipe,
    work: Work,
) -> CalibratedLayers:
    """Run the text through the decoder layers, from the first that is not passed."""
    family, device = model.family, parse_device(recipe.device)
    streamed = StreamedModel(source, family, source.dtype, device, model.tensors)
    flow = Flow.into(streamed, windows, dense_only=True)
    flows, kept, passed = {_CALIBRATION: flow}, work.interval(_CALIBRATION), CalibratedLayers()
    if kept is not None:
        passed = CalibratedLayers.of(kept)
        load_states(kept, flows)
    done, count = len(passed.rounded), model.layers
    left = range(done, count)
    for index in tqdm(left, desc="calibrate", unit="layer", initial=done, total=count):
        decision, stored_name = model.decision(index), model.stored_name(index)
        groups = [one.layout.group for one in decision]
        with streamed.resident(index) as layer:
            for linear in (one for group in groups for one in group.linears):
                weight = linear_of(layer, linear).weight.data
                raise_if_any(number_problems(stored_name(f"{linear}.weight"), weight))
            with summed_squares(layer, groups) as squares:
                flow.pass_dense(index, layer)
            unreached = count_unreached(groups, squares)
            inputs = mean_norms(layer, groups, squares, flow.tokens)
            energies = {group: norm.square() for group, norm in inputs.items()}
            smooths = recipe.smoothing
            rounded = choose_grids(layer, decision, energies, values, rounds=False, smooths=smooths)
        for linear, scale in rounded.scales.items():
            check_scale(stored_name(linear), scale, values)
        divided = divided_norms(decision, rounded)
        norms = {stored_name(norm): exponents for norm, exponents in divided.items()}
        passed.add(rounded, norms, unreached)
        work.keep_interval(_CALIBRATION, with_states(passed.step(), flows))
    return passed
