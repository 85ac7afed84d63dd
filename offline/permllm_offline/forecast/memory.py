"""What a prune holds in memory, from its recipe and the sizes of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from permllm_offline.model.heads import kv_cache_bytes
from permllm_offline.model.prune_plan import Plan, PlannedLinear, pruned
from permllm_offline.model.recomputation import activation_bytes, held_activation_bytes
from permllm_offline.permutation.learned_layers import parse_layers, spans, trained_spans
from permllm_offline.permutation.masked_linear import PART_ELEMENTS
from permllm_offline.preparation.method_parts import parts_of, reads_activations
from permllm_offline.preparation.prepared import Prepared
from permllm_offline.pruning.streamed import can_stream
from permllm_offline.recipe.schema import Recipe
from permllm_offline.reconstruction.kept_values import CHANNEL_BYTES
from permllm_offline.reconstruction.obs import (
    FACTOR_BYTES,
    ROW_BYTES,
    ROWS_AT_ONCE,
    USED_FACTOR_BYTES,
)
from permllm_offline.run.processes import count
from permllm_offline.sparsity.importance import CHUNK_ELEMENTS
from permllm_offline.text.sampled_text import PIECE, PIECES_AT_ONCE
from permllm_offline.text.windows import writes_itself

GRADIENT_COPIES, GRADIENT_BYTES = 8, 4 + 4 + 1 + 1
"""For each weight of the blocks whose permutation gets its gradient at once: what leads there in
the model's dtype, and importances and masks."""

LOGIT_COPIES = 10
"""Of the logits in float32, beside two for each Sinkhorn iteration: Adam's states, what is softened
and hardened, and gradients."""

SCORED_BYTES = 4 * 4
"""For each weight of the linear that is masked, updated or baked: importance, ranks, copies."""

CHUNK_BYTES = 4 + 8 + 3 * 4
"""For each weight of the rows that are scored, compared and summed at once: copies and ranks."""

ASSIGNED_BYTES = 32
"""For each row and channel of a block whose channels are assigned: scores, copies, the best."""

TRAINED_BYTES = 4 + 8
"""For each kept weight that is tuned: a float32 copy, and the states of Adam."""

SMALLEST_SHARD_BYTES = 500_000_000
"""Of the output: a model that is not larger stays one file."""


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes that are in memory together.

    ``common`` is there whichever decoder layer is at work, ``layers`` has what each adds to it, and
    ``outside`` is the most before the first layer, between whole passes, or after the last.
    """

    common: int
    layers: Sequence[int]
    outside: int

    @property
    def peak_bytes(self) -> int:
        """The most at any time."""
        return max(self.common + max(self.layers), self.outside)


def shard_bytes(plan: Plan) -> int:
    """Bytes of a file of the output at most: about one dense decoder layer, since it is in memory.

    A tensor that is larger has a file of its own.
    """
    return max(SMALLEST_SHARD_BYTES, *map(_dense_bytes, plan.all_by_layer))


def converted_shard_bytes(sizes: Mapping[str, int], stack: str) -> int:
    """Bytes of a file of a conversion at most: those of the largest decoder layer, as in a prune.

    Args:
        sizes: bytes of each tensor of the dense model by its name.
        stack: what the names of decoder layers begin with.
    """
    by_layer: Counter[str] = Counter()
    for name, size in sizes.items():
        if name.startswith(stack):
            by_layer[name.removeprefix(stack).partition(".")[0]] += size
    return max([SMALLEST_SHARD_BYTES, *by_layer.values()])


def memory_forecast(recipe: Recipe, prepared: Prepared) -> MemoryForecast:
    """Forecast weights, states of training, activations, hidden states and files of the output.

    A GPU has neither hidden states nor files in its memory. What several processes share out counts
    as the part of one.
    """
    plan, on_host = prepared.plan, prepared.device.type == "cpu"
    rest = plan.total_bytes - sum(linear.sparse_bytes for linear in plan.every_linear)
    states = _state_bytes(recipe, prepared) if on_host else 0
    shard = min(shard_bytes(plan), plan.total_bytes) if on_host else 0
    if can_stream(recipe):
        return _streamed(recipe, prepared, rest, states, shard)
    masks = sum(linear.weights for linear in plan.linears) // 8
    held = rest + masks + sum(map(_dense_bytes, plan.all_by_layer))
    scored = _scored(plan.linears)
    whole = scored + max(states + _training_bytes(recipe, prepared), shard)
    whole = max(whole, states + _logit_bytes(prepared))
    return MemoryForecast(held + states, _at_work(recipe, prepared), held + whole)


def peak_bytes(recipe: Recipe, prepared: Prepared) -> int:
    """The most bytes that a prune holds at any time."""
    return memory_forecast(recipe, prepared).peak_bytes


def _streamed(
    recipe: Recipe, prepared: Prepared, rest: int, states: int, shard: int
) -> MemoryForecast:
    """A layer with its masks and what it takes; embeddings, or the head, before it and after."""
    plan, item = prepared.plan, prepared.dtype.itemsize
    by_layer = plan.all_by_layer
    dense = [_dense_bytes(linears) for linears in by_layer]
    layers = [_layer_bytes(recipe, prepared, linears) for linears in by_layer]
    layers = list(map(max, layers, _learned_in_spans(recipe, prepared)))
    head = min(rest, _head_weights(prepared) * item)
    tied = rest < 2 * head
    at_the_ends = states + (rest if tied else rest - head) + _logit_bytes(prepared)
    # Before the layers come the tensors left dense: one is read while others wait in their file.
    left_dense = [linear.dense_bytes for linear in plan.every_linear if not linear.pruned]
    largest = max([head, *left_dense])
    writing = max(shard + max(map(_baked, by_layer)), max(shard, largest) + largest)
    sampling = 0
    if any(map(writes_itself, recipe.datasets)):
        sampling = rest + sum(dense) + sampled_cache_bytes(prepared.source.config, recipe, item)
    return MemoryForecast(states, layers, max(at_the_ends, writing if shard else 0, sampling))


def sampled_cache_bytes(config: Any, recipe: Recipe, itemsize: int) -> int:
    """The KV cache of the pieces of text that a model writes at once."""
    tokens = PIECES_AT_ONCE * min(PIECE, recipe.sequence_length)
    return kv_cache_bytes(config, tokens, itemsize)


def _layer_bytes(recipe: Recipe, prepared: Prepared, linears: Sequence[PlannedLinear]) -> int:
    """A decoder layer with its packed masks, and the most of what comes one after the other."""
    item, windows = prepared.dtype.itemsize, prepared.windows
    sparse = pruned(linears)
    dense, masks = _dense_bytes(linears), sum(linear.weights for linear in sparse) // 8
    tried = parts_of(recipe).reconstruction.layer is not None
    scored = max((linear.weights for linear in sparse), default=0)
    return (
        dense
        + masks
        + max(
            max(linear.dense_bytes for linear in linears),  # read while the layer is there
            CHUNK_BYTES * min(CHUNK_ELEMENTS, scored),
            _assigned(recipe, sparse),
            _window_bytes(linears, 0 if windows is None else recipe.sequence_length, item),
            _dense_bytes(sparse) // 2 if tried else 0,  # pruned weights, while masks are tried
            _reconstructing(recipe, linears, item),
        )
    )


def _by_group(linears: Sequence[PlannedLinear]) -> list[list[PlannedLinear]]:
    """The linears of a decoder layer that read the same tensor."""
    groups: dict[str, list[PlannedLinear]] = {}
    for linear in linears:
        groups.setdefault(linear.layout.group.name, []).append(linear)
    return list(groups.values())


def _assigned(recipe: Recipe, linears: Sequence[PlannedLinear]) -> int:
    """While the channels of a block are assigned to groups: what all its rows score."""
    if not parts_of(recipe).permutation.assigns:
        return 0
    assigned = (
        ASSIGNED_BYTES
        * sum(linear.out_features for linear in group)
        * int(group[0].layout.ties().bincount().max())
        * group[0].layout.block_size
        for group in _by_group(linears)
    )
    return max(assigned, default=0)


def _window_bytes(linears: Sequence[PlannedLinear], tokens: int, item: int) -> int:
    """Activations of a forward pass: a group's input and outputs, and as much in between.

    At most, recurrences hold what they keep for a backward pass.
    """
    channels = max(
        group[0].layout.group.share
        * (group[0].layout.in_features + sum(linear.out_features for linear in group))
        for group in _by_group(linears)
    )
    return round((2 * channels * item + sum(one.kept_beside for one in linears)) * tokens)


def _baked(linears: Sequence[PlannedLinear]) -> int:
    """While a layer is baked: masks, a dense matrix, and its kept values."""
    sparse = pruned(linears)
    masks = sum(linear.weights for linear in sparse) // 8
    return masks + max((linear.dense_bytes * 3 // 2 for linear in sparse), default=0)


def _logit_bytes(prepared: Prepared) -> int:
    """Of one held-out window: as the head gives them, in float32, and their logarithms."""
    if prepared.windows is None or not len(prepared.windows.held_out):
        return 0
    vocabulary: int = prepared.source.config.get_text_config().vocab_size
    tokens = prepared.windows.held_out.shape[1]
    return tokens * vocabulary * (prepared.dtype.itemsize + 4 + 4)


def _learned_in_spans(recipe: Recipe, prepared: Prepared) -> list[int]:
    """For each decoder layer, those that are there together with it, and what they take beside it.

    Where none of them learns, one after the other is masked under the reallocation, in a copy.
    """
    plan, by_layer = prepared.plan, prepared.plan.all_by_layer
    if not parts_of(recipe).permutation.learns:
        return [0] * len(by_layer)
    learned = set(parse_layers(recipe.learning.layers, len(by_layer), plan.pruned_layers).layers)
    training = _learning_bytes(recipe, prepared)
    found: list[int] = []
    for span in spans(recipe.learning, learned, len(by_layer)):
        together = by_layer[span.start : span.stop]
        dense = sum(map(_dense_bytes, together))
        sparse = [pruned(linears) for linears in together]
        masked = max(map(_dense_bytes, sparse)) + max(map(_scored, sparse))
        found += [dense + (masked if learned.isdisjoint(span) else training)] * len(span)
    return found


def _training_bytes(recipe: Recipe, prepared: Prepared) -> int:
    """States and activations of a loop that runs the whole model."""
    plan, item, length = prepared.plan, prepared.dtype.itemsize, recipe.sequence_length
    parts = parts_of(recipe)
    training = 0
    if parts.permutation.learns:
        # Layers before those that learn are masked one after the other, in a copy.
        masked = max(_dense_bytes(pruned(linears)) for linears in plan.all_by_layer)
        training = max(masked, _learning_bytes(recipe, prepared))
    if parts.reconstruction.distils:
        tuned = _tuning(plan.linears, item, count())
        return max(training, tuned + held_activation_bytes(plan, length, item))
    return training


def _learning_bytes(recipe: Recipe, prepared: Prepared) -> int:
    """What the decoder layers that learn together take beside their weights."""
    plan, item = prepared.plan, prepared.dtype.itemsize
    trained = trained_spans(recipe.learning, len(plan.layers), plan.pruned_layers)
    share = max(map(len, trained)) / len(plan.layers)
    masks = max(
        sum(linear.weights for index in span for linear in pruned(plan.all_by_layer[index])) // 8
        for span in trained
    )
    tokens = recipe.learning.windows_at_once * recipe.sequence_length
    largest = max(linear.weights for linear in plan.linears)
    at_once = (GRADIENT_COPIES * item + GRADIENT_BYTES) * min(PART_ELEMENTS, largest)
    checkpointing = recipe.learning.gradient_checkpointing
    step = item * largest + at_once
    step += held_activation_bytes(plan, tokens, item, share, checkpointing)
    states = masks + _masked_bytes(recipe, plan, trained)
    states += _logit_state_bytes(recipe, prepared, trained)
    # Before the first step the mean of the scores is taken, while the weight is laid out anew.
    return states + max(step, (4 + item) * largest)


def _masked_bytes(recipe: Recipe, plan: Plan, trained: Sequence[range]) -> int:
    """Masked copies of the decoder layers that do not learn, but lie in a span with some that do.

    With ``auto:N`` those are the most that they can be.
    """
    choice = parse_layers(recipe.learning.layers, len(plan.layers), plan.pruned_layers)
    copies = [_dense_bytes(pruned(linears)) for linears in plan.all_by_layer]
    if choice.most_sensitive is None:
        return max(
            sum(copies[index] for index in span if index not in choice.layers) for span in trained
        )
    learning = choice.most_sensitive if recipe.learning.scope == "model" else 1
    may_learn = set(plan.pruned_layers)
    return max(
        sum(sorted(copies[index] for index in span if index in may_learn)[learning:])
        for span in trained
    )


def _logit_state_bytes(recipe: Recipe, prepared: Prepared, trained: Sequence[range]) -> int:
    """Logits of the permutations that are learned together, and what follows from them."""
    layers = prepared.plan.layers
    blocks = max(
        sum(int(layout.ties().max()) + 1 for index in span for layout in layers[index])
        for span in trained
    )
    copies = LOGIT_COPIES + 2 * recipe.learning.sinkhorn_iterations
    return blocks * recipe.block_size**2 * 4 * copies


def _at_work(recipe: Recipe, prepared: Prepared) -> list[int]:
    """What each decoder layer takes beside its weights while it is pruned."""
    item = prepared.dtype.itemsize
    return [
        max(_scored(pruned(linears)), _reconstructing(recipe, linears, item))
        for linears in prepared.plan.all_by_layer
    ]


def _reconstructing(recipe: Recipe, linears: Sequence[PlannedLinear], item: int) -> int:
    """The most while one decoder layer is updated and tuned; the latter with its activations."""
    reconstruction, sparse = parts_of(recipe).reconstruction, pruned(linears)
    states = [0]
    if reconstruction.updates:
        states += map(_updating, sparse)
    if reconstruction.tunes and sparse:
        activations = activation_bytes(linears, recipe.sequence_length, item)
        states.append(_tuning(sparse, item) + activations)
    return max(states)


def _tuning(linears: Sequence[PlannedLinear], item: int, processes: int = 1) -> int:
    """While linears are tuned together, shared out to processes.

    Of each kept weight its gradient, the number of its channel, its best value, and what
    ``TRAINED_BYTES`` names; of the linear that is at work its whole gradient, or that of its kept
    weights in float32.
    """
    kept = sum(map(_kept, linears))
    shared = kept * (TRAINED_BYTES + item) // processes
    at_work = max(max(linear.weights * item, _kept(linear) * 4) for linear in linears)
    return shared + kept * (item + CHANNEL_BYTES) + at_work


def _kept(linear: PlannedLinear) -> int:
    """Weights that stay: every supported pattern keeps half."""
    return linear.weights // 2


def _updating(linear: PlannedLinear) -> int:
    """While a linear is updated: its moment is factored, then some rows are after others."""
    channels = linear.layout.in_features
    rows = min(linear.out_features, ROWS_AT_ONCE)
    used = USED_FACTOR_BYTES * channels**2 + ROW_BYTES * rows * channels
    return max(FACTOR_BYTES * channels**2, used)


def _scored(linears: Sequence[PlannedLinear]) -> int:
    return SCORED_BYTES * max((linear.weights for linear in linears), default=0)


def _dense_bytes(linears: Sequence[PlannedLinear]) -> int:
    return sum(linear.dense_bytes for linear in linears)


def _head_weights(prepared: Prepared) -> int:
    """Weights of the head, or of the embeddings."""
    vocabulary: int = prepared.source.config.get_text_config().vocab_size
    return vocabulary * prepared.plan.hidden_size


def _state_bytes(recipe: Recipe, prepared: Prepared) -> int:
    """Hidden states: those that are passed on, and the next layer's."""
    held_out = 0 if prepared.windows is None else prepared.windows.held_out.numel()
    read = read_tokens(recipe, prepared)
    routed = _hidden_bytes(prepared, routed_tokens(recipe, prepared))
    if can_stream(recipe):
        return passed_bytes(recipe, prepared) + _hidden_bytes(prepared, read + held_out) + routed
    return _hidden_bytes(prepared, 3 * (read + held_out)) + routed


def passed_bytes(recipe: Recipe, prepared: Prepared) -> int:
    """Hidden states between two layers of a streamed model: dense and, where they are read, pruned.

    A prune that is resumed goes on from them, so they lie in the work folder too.
    """
    held_out = 0 if prepared.windows is None else prepared.windows.held_out.numel()
    parts = parts_of(recipe)
    kinds = 2 if parts.permutation.learns or parts.reconstruction.layer is not None else 1
    return _hidden_bytes(prepared, kinds * read_tokens(recipe, prepared) + 2 * held_out)


def _hidden_bytes(prepared: Prepared, tokens: int) -> int:
    return tokens * prepared.plan.hidden_size * prepared.dtype.itemsize


def routed_tokens(recipe: Recipe, prepared: Prepared) -> int:
    """Tokens of which it is kept what comes to the experts of a layer while these are updated."""
    mixed = any(layout.group.experts for layouts in prepared.plan.layers for layout in layouts)
    if not (mixed and parts_of(recipe).reconstruction.updates):
        return 0
    return updated_tokens(recipe, prepared)


def updated_tokens(recipe: Recipe, prepared: Prepared) -> int:
    """Tokens that the reconstruction of a decoder layer reads: fewer where distillation follows."""
    read = read_tokens(recipe, prepared)
    if parts_of(recipe).reconstruction.distils:
        return min(read, recipe.distillation.layer_windows * recipe.sequence_length)
    return read


def read_tokens(recipe: Recipe, prepared: Prepared) -> int:
    """Tokens that pass through the dense model, those that it writes itself included."""
    if prepared.windows is None or not reads_activations(recipe):
        return 0
    read = prepared.windows.calibration.numel()
    if parts_of(recipe).reconstruction.distils:
        read += recipe.distillation.self_windows * recipe.sequence_length
    return read
