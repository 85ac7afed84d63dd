"""Text is read as tokenizer.json says, here and by whoever loads the checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from permllm_offline.cli import main
from permllm_offline.model.loading import open_source
from permllm_offline.model.tokenizer import load_tokenizer, tokenizer_files
from tests.offline.tiny_models import tiny_llama, tiny_model

TEXT = "Hello  world\n\nsays na\u00efve 42"


def byte_level(
    directory: Path, tokenizer_class: str | None, model_type: str = "llama"
) -> Tokenizer:
    """A model whose tokenizer is byte by byte, and whose configuration names a class for it."""
    tiny_model(model_type).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<unk>", *alphabet])}
    stored = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    stored.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    stored.decoder = decoders.ByteLevel()
    stored.enable_truncation(4)
    stored.save(str(directory / "tokenizer.json"))
    if tokenizer_class is not None:
        config = {"tokenizer_class": tokenizer_class, "chat_template": "{{ 'hi' }}"}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    stored.no_truncation()
    return stored


def tokens(tokenizer: Any) -> list[int]:
    return tokenizer(TEXT, add_special_tokens=False, truncation=False).input_ids


@pytest.mark.parametrize(
    "tokenizer_class", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None]
)
def test_every_byte_is_read_whatever_class_is_named(
    tokenizer_class: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored = byte_level(tmp_path, tokenizer_class)
    tokenizer = load_tokenizer(open_source(str(tmp_path)))
    assert tokens(tokenizer) == stored.encode(TEXT).ids
    assert tokenizer.decode(tokens(tokenizer)) == TEXT
    right = tokens(AutoTokenizer.from_pretrained(tmp_path)) == stored.encode(TEXT).ids
    assert right or tokenizer_class not in ("PreTrainedTokenizerFast", None)
    warned = [record for record in caplog.records if record.name.startswith("permllm")]
    assert (not warned) == right
    assert (tokenizer_files(tmp_path) == {}) == right


def test_every_checkpoint_that_is_written_is_read_by_transformers_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    stored = byte_level(source, "LlamaTokenizerFast")
    sparse = tmp_path / "sparse"
    written = {
        sparse: ["prune", str(source), "--method", "magnitude"],
        tmp_path / "int8": ["convert", str(sparse), "--values", "int8"],
        tmp_path / "dense": ["convert", str(sparse), "--to", "dense"],
        tmp_path / "again": ["convert", str(tmp_path / "dense")],
    }
    for output, command in written.items():
        assert main([*command, "--output", str(output)]) == 0
        copy = AutoTokenizer.from_pretrained(output)
        assert tokens(copy) == stored.encode(TEXT).ids
        assert copy.chat_template == "{{ 'hi' }}"
        assert tokenizer_files(output) == {}


def test_where_no_class_that_is_named_helps_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of some families Transformers takes its own class, whose rule to split words is its own."""
    stored = byte_level(tmp_path, "PreTrainedTokenizerFast", "qwen2")
    assert tokens(load_tokenizer(open_source(str(tmp_path)))) == stored.encode(TEXT).ids
    changed = json.loads((tmp_path / "tokenizer.json").read_text())
    changed["pre_tokenizer"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    caplog.clear()
    assert tokenizer_files(tmp_path) == {}
    assert "whatever class is named: Transformers and vLLM will misread" in caplog.text


def test_a_folder_without_a_tokenizer_has_nothing_to_correct(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    assert tokenizer_files(tmp_path) == {}


def test_the_chat_template_of_mistral_is_there_beside_its_own_format(tmp_path: Path) -> None:
    stored = byte_level(tmp_path, "PreTrainedTokenizerFast", "mistral")
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever mistral_common raises
        AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(open_source(str(tmp_path)))
    assert tokenizer.chat_template == "{{ 'hi' }}"
    assert tokens(tokenizer) == stored.encode(TEXT).ids
