"""Tiny random models of text and images, with processors where a test shows them an image."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.offline.tiny_models import COMMON, LLAMA_LIKE, SIZES

PATCH = 14
SPECIAL = {
    "image": "<image>",
    "boi": "<begin of image>",
    "eoi": "<end of image>",
    "video": "<|video|>",
    "audio": "<audio>",
    "boa": "<begin of audio>",
    "eoa": "<end of audio>",
}
"""What the processors ask the tokenizer for; each has a token of its own after those of bytes."""
INTERNVL = {
    "context_image": SPECIAL["image"],
    "start_image": SPECIAL["boi"],
    "end_image": SPECIAL["eoi"],
}
"""The same by the names of one of them."""
BYTES, END = 256, "<end>"
LINES = ["\n", "\n\n", "\n\n\n", "\n\n\n\n"]
"""Tokens of Gemma's, which vLLM looks up."""
WORDS = 320
IMAGE, BEGIN, FINISH, VIDEO = range(BYTES + 1, BYTES + 5)

TOWER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 4 * PATCH,
    "patch_size": PATCH,
}
QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": COMMON["hidden_size"],
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": FINISH,
}
ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
"""Positions of an image are pairs: so many channels of a head for time, height and width."""


def _text(model_type: str, **other: object) -> dict[str, object]:
    sizes = COMMON | SIZES.get(model_type, LLAMA_LIKE) | {"vocab_size": WORDS} | other
    return {"model_type": model_type, **sizes}


def _sections(*channels: int) -> dict[str, object]:
    (key, rotated) = next(iter(ROTATED.items()))
    return {key: {**rotated, "mrope_section": list(channels)}}


CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = {
    "qwen3_5": QWEN
    | {"text_config": _text("qwen3_5_text")}
    | {"vision_config": QWEN_TOWER | {"num_position_embeddings": 16}},
    "qwen3_vl": QWEN
    | {"text_config": _text("qwen3_vl_text", **_sections(16, 8, 8))}
    | {
        "vision_config": QWEN_TOWER
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    },
    "qwen2_5_vl": QWEN
    | {"text_config": _text("qwen2_5_vl_text", **_sections(8, 12, 12))}
    | {"vision_config": QWEN_TOWER | {"fullatt_block_indexes": [0], "window_size": 8 * PATCH}},
    "gemma3": {
        "text_config": _text("gemma3_text"),
        "vision_config": TOWER | {"model_type": "siglip_vision_model"},
        "image_token_index": IMAGE,
        "boi_token_index": BEGIN,
        "eoi_token_index": FINISH,
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": _text("ministral3"),
        "vision_config": TOWER | {"model_type": "pixtral", "head_dim": 32},
        "image_token_index": IMAGE,
    },
    "llava": {
        "text_config": _text("llama"),
        "vision_config": TOWER | {"model_type": "clip_vision_model", "projection_dim": 64},
        "image_token_index": IMAGE,
    },
    "internvl": {
        "text_config": _text("qwen3"),
        "vision_config": TOWER
        | {"model_type": "internvl_vision"}
        | {"image_size": [4 * PATCH] * 2, "patch_size": [PATCH] * 2},
        "image_token_id": IMAGE,
    },
    "smolvlm": {
        "text_config": _text("llama"),
        "vision_config": TOWER | {"model_type": "smolvlm_vision"},
        "image_token_id": IMAGE,
    },
}

OF_THE_HUB = {
    "gemma3": ("vision_tower.", "vision_tower.vision_model."),
    "llava": ("vision_tower.", "vision_tower.vision_model."),
}
"""Prefixes that Transformers writes today, and those of the hub, which vLLM asks for."""


def tiny_multimodal(model_type: str, directory: Path, *, tied: bool = False) -> Path:
    """Write a random model of bfloat16 with a tokenizer; weights are large enough to matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, tie_word_embeddings=tied, **CONFIGURATIONS[model_type]
    )
    model = AutoModelForMultimodalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.to(torch.bfloat16).save_pretrained(directory)
    if model_type in OF_THE_HUB:
        _rename(directory / "model.safetensors", *OF_THE_HUB[model_type])
    if model_type in PROCESSORS:
        PROCESSORS[model_type]().save_pretrained(directory)
    else:
        byte_tokenizer().save_pretrained(directory)
    return directory


def _rename(file: Path, old: str, new: str) -> None:
    tensors = {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, and of the tokens of `SPECIAL`."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {token: BYTES + i for i, token in enumerate((END, *SPECIAL.values(), *LINES))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = {f"{kind}_token": token for kind, token in (SPECIAL | INTERNVL).items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=LINES,
        unk_token=END,
        eos_token=END,
        pad_token=END,
        extra_special_tokens=tokens,
    )


def _qwen_processor() -> Any:
    sizes = {
        "patch_size": PATCH,
        "size": {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": (8 * PATCH) ** 2},
    }
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(**sizes), byte_tokenizer(), Qwen3VLVideoProcessor(**sizes)
    )


def _gemma_processor() -> Any:
    size = {"height": 4 * PATCH, "width": 4 * PATCH}
    return Gemma3Processor(Gemma3ImageProcessor(size=size), byte_tokenizer(), image_seq_length=4)


def _pixtral_processor() -> Any:
    return PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 4 * PATCH}, patch_size=2 * PATCH),
        byte_tokenizer(),
        patch_size=PATCH,
        spatial_merge_size=2,
        image_token=SPECIAL["image"],
        image_break_token=SPECIAL["boi"],
        image_end_token=SPECIAL["eoi"],
    )


def _internvl_processor() -> Any:
    size = {"height": 4 * PATCH, "width": 4 * PATCH}
    images = GotOcr2ImageProcessor(size=size, crop_to_patches=False)
    videos = InternVLVideoProcessor(size=size)
    return InternVLProcessor(images, byte_tokenizer(), videos, image_seq_length=4)


PROCESSORS: Mapping[str, Callable[[], Any]] = {
    "internvl": _internvl_processor,
    "qwen3_5": _qwen_processor,
    "qwen3_vl": _qwen_processor,
    "gemma3": _gemma_processor,
    "mistral3": _pixtral_processor,
}
