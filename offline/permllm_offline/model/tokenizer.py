"""The tokenizer beside a model, which reads text as its tokenizer.json says."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from permllm_offline.errors import OfflineError, first_line
from permllm_offline.model.conventions import begin_token
from permllm_offline.model.loading import TRUST_NOTHING, Source
from permllm_vllm.checkpoint.shards import CONFIG_NAME

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_OF_MISTRAL = "tekken.json"
_CLASS = "PreTrainedTokenizerFast"
"""Takes all of tokenizer.json, and adds nothing of its own."""
_PROBE = "Hello world, 2023!\n\n  na\u00efve = [x]"
"""Tells apart whether spaces, line breaks, digits and accents are kept."""


def load_tokenizer(source: Source) -> Any:
    """Load the tokenizer beside a model; raises OfflineError where there is none.

    Its attribute ``window_begin`` is ``conventions.begin_token`` of the model, and ``positions``
    the tokens that the model has positions for, or None where its configuration does not say;
    ``embeddings`` is how many tokens the model knows, or None.
    """
    try:
        tokenizer, misread = _loaded(source.directory)
    except Exception as error:  # transformers raises too many kinds to list
        raise OfflineError(
            f"{source.name!r} has no readable tokenizer ({first_line(error)}). Copy the "
            "tokenizer files of the base model into the folder."
        ) from error
    if misread:
        logger.warning(
            "%s reads %s otherwise than it is written, so %s reads it here",
            misread,
            source.directory / TOKENIZER,
            _CLASS,
        )
    tokenizer.window_begin = begin_token(source.config)
    text_config = source.config.get_text_config()
    tokenizer.positions = getattr(text_config, "max_position_embeddings", None)
    tokenizer.embeddings = getattr(text_config, "vocab_size", None)
    return tokenizer


def tokenizer_files(directory: Path) -> dict[str, str]:
    """Files in place of those of a model's folder, so that a copy of it is read as it should be.

    Transformers knows some models whose class misreads their tokenizer.json by their names on the
    hub, which a folder does not have.

    Returns:
        File name -> content; empty where the copy is right, or where nothing corrects it.
    """
    try:
        misread = _loaded(directory)[1]
        if not misread:
            return {}
        text = _naming_the_class(directory)
        corrected = not _loaded_with(directory, text)
    except Exception:  # of a tokenizer that cannot be read: `load_tokenizer` is who reports it
        return {}
    if not corrected:
        logger.warning(
            "%s reads %s otherwise than it is written, whatever class is named: Transformers and "
            "vLLM will misread text for the checkpoint",
            misread,
            directory / TOKENIZER,
        )
        return {}
    logger.warning(
        "%s of the checkpoint names %s in place of %s, which reads %s otherwise than it is written",
        TOKENIZER_CONFIG,
        _CLASS,
        misread,
        TOKENIZER,
    )
    return {TOKENIZER_CONFIG: text}


def _naming_the_class(directory: Path) -> str:
    path = directory / TOKENIZER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config["tokenizer_class"] = _CLASS
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _loaded_with(directory: Path, tokenizer_config: str) -> str:
    """The class that would misread a copy of a folder's tokenizer with another configuration."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in (TOKENIZER, CONFIG_NAME):
            (copy / name).symlink_to((directory / name).resolve())
        (copy / TOKENIZER_CONFIG).write_text(tokenizer_config, encoding="utf-8")
        return _loaded(copy)[1]


def _loaded(directory: Path) -> tuple[Any, str]:
    """The tokenizer, and the class that its configuration asks for where that one misreads it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options = dict(TRUST_NOTHING)
    if not (directory / TOKENIZER).exists():
        return AutoTokenizer.from_pretrained(directory, **options), ""
    if (directory / _OF_MISTRAL).exists():
        options["mistral_format"] = False  # mistral_common's has no chat template
    try:
        asked = AutoTokenizer.from_pretrained(directory, **options)
    except ValueError:  # a class that Transformers lacks, or an option of a newer one
        return PreTrainedTokenizerFast.from_pretrained(directory, **TRUST_NOTHING), ""
    expected = _stored_tokens(directory)
    if _tokens(asked) == expected:
        return asked, ""
    stored = PreTrainedTokenizerFast.from_pretrained(directory, **TRUST_NOTHING)
    return (stored, type(asked).__name__) if _tokens(stored) == expected else (asked, "")


def _tokens(tokenizer: Any) -> list[int]:
    tokens: list[int] = tokenizer(_PROBE, add_special_tokens=False).input_ids
    return tokens


def _stored_tokens(directory: Path) -> list[int]:
    from tokenizers import Tokenizer

    stored = Tokenizer.from_file(str(directory / TOKENIZER))
    stored.no_padding()
    stored.no_truncation()
    tokens: list[int] = stored.encode(_PROBE, add_special_tokens=False).ids
    return tokens
