"""A plain Llama whose step can be captured in a CUDA graph, and where its weights come from.

Needs PyTorch, and safetensors to read a checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Linear = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, by the names of its configuration in transformers."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    vocab_size: int = 32000
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


class RandomWeights(Mapping[str, Tensor]):
    """Tensors in the shapes of a Llama, drawn when they are asked for."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device):
        heads, head = shape.num_attention_heads, shape.head_dim
        hidden, middle = shape.hidden_size, shape.intermediate_size
        self._dtype, self._device = dtype, device
        self._shapes: dict[str, tuple[int, ...]] = {
            "q_proj": (heads * head, hidden),
            "k_proj": (shape.num_key_value_heads * head, hidden),
            "v_proj": (shape.num_key_value_heads * head, hidden),
            "o_proj": (hidden, heads * head),
            "gate_proj": (middle, hidden),
            "up_proj": (middle, hidden),
            "down_proj": (hidden, middle),
            "embed_tokens": (shape.vocab_size, hidden),
            "lm_head": (shape.vocab_size, hidden),
        }

    def __getitem__(self, name: str) -> Tensor:
        kind = name.split(".")[-2]
        if kind not in self._shapes:
            return torch.ones(self._shapes["q_proj"][1], dtype=self._dtype, device=self._device)
        size = self._shapes[kind]
        return torch.randn(size, dtype=self._dtype, device=self._device) * size[1] ** -0.5

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class StoredWeights(Mapping[str, Tensor]):
    """Tensors of a checkpoint, read when they are asked for; a tied head is the embedding."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device):
        from safetensors import safe_open

        self._open, self._dtype, self._device = safe_open, dtype, device
        self._places: dict[str, tuple[Path, str]] = {}
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                self._places.update({name: (file, name) for name in stored.keys()})  # noqa: SIM118
        self._places.setdefault("lm_head.weight", self._places["model.embed_tokens.weight"])

    def __getitem__(self, name: str) -> Tensor:
        file, stored_name = self._places[name]
        with self._open(file, "pt") as stored:
            return stored.get_tensor(stored_name).to(self._device, self._dtype)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def load(
    directory: Path, dtype: torch.dtype, device: torch.device
) -> tuple[Shape, Mapping[str, Tensor]]:
    """A Llama that transformers wrote: its sizes and weights."""
    shape = shape_of(json.loads((directory / "config.json").read_text()), directory)
    return shape, StoredWeights(directory, dtype, device)


def shape_of(config: Mapping[str, Any], directory: Path) -> Shape:
    """The sizes in a configuration of transformers.

    Raises:
        SystemExit: it is of no Llama.
    """
    config = dict(config)
    if config["model_type"] not in ("llama", "mistral"):
        raise SystemExit(f"{directory} holds a {config['model_type']}, this reads only Llamas")
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config["rope_theta"] = (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
    names = [field.name for field in dataclasses.fields(Shape)]
    return Shape(**{name: config[name] for name in names})


class Llama:
    """A decoder that takes one token of every sequence a step, from and to fixed memory.

    `layers` hold the merged linear layers "qkv", "o", "gate_up" and "down" of every decoder layer.
    """

    def __init__(
        self,
        shape: Shape,
        weights: Mapping[str, Tensor],
        layers: list[dict[str, Linear]],
        sequences: int,
        length: int,
    ):
        self.shape = shape
        self.embedding = weights["model.embed_tokens.weight"]
        self.head = weights["lm_head.weight"]
        self.norm = weights["model.norm.weight"]
        names = ("input_layernorm", "post_attention_layernorm")
        self.norms = [
            [weights[f"model.layers.{i}.{name}.weight"] for name in names]
            for i in range(shape.num_hidden_layers)
        ]
        self.linears = layers
        device, dtype = self.embedding.device, self.embedding.dtype
        self.token = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(sequences, shape.vocab_size, dtype=dtype, device=device)
        self.cache = torch.zeros(
            shape.num_hidden_layers, 2, sequences, shape.num_key_value_heads, length,
            shape.head_dim, dtype=dtype, device=device,
        )  # fmt: skip
        self.positions = torch.arange(length, device=device)
        exponents = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
        self.frequencies = shape.rope_theta**-exponents

    def step(self) -> None:
        """Reads `token` and `position`; writes `logits`, the likeliest token, the next position."""
        shape = self.shape
        angles = self.position * self.frequencies
        turn = torch.cat((angles, angles))
        cosine, sine = (f(turn).to(self.embedding.dtype) for f in (torch.cos, torch.sin))
        seen = (self.positions <= self.position).view(1, 1, 1, -1)
        heads, kv_heads, size = (
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.head_dim,
        )
        x = functional.embedding(self.token, self.embedding)
        for norms, linears, cache in zip(self.norms, self.linears, self.cache, strict=True):
            qkv = linears["qkv"](self._normal(x, norms[0])).unflatten(-1, (-1, size))
            q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
            q, k = (t * cosine + _half_turn(t) * sine for t in (q, k))
            cache[0].index_copy_(2, self.position, k.unsqueeze(2))
            cache[1].index_copy_(2, self.position, v.unsqueeze(2))
            mixed = functional.scaled_dot_product_attention(
                q.unsqueeze(2), cache[0], cache[1], attn_mask=seen, enable_gqa=heads != kv_heads
            )
            x = x + linears["o"](mixed.flatten(1))
            gate, up = linears["gate_up"](self._normal(x, norms[1])).chunk(2, dim=-1)
            x = x + linears["down"](functional.silu(gate) * up)
        self.logits.copy_(functional.linear(self._normal(x, self.norm), self.head))
        self.token.copy_(self.logits.argmax(dim=-1))
        self.position += 1

    def _normal(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.shape.rms_norm_eps)


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
