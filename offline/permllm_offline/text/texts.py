"""Documents of a data set: a text, JSON-lines or parquet file, a folder of them, or a hub name."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from permllm_offline.errors import OfflineError, first_line
from permllm_offline.local_path import local_path

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")
TEXT_FIELD = "text"

MAX_CHARACTERS = 16 * 8_000_000
"""Characters of one document that are read at most: sixteen for each token that ``calibration``
reads, more than tokens have on average in any language."""

NAMED: Mapping[str, Mapping[str, str]] = {
    "c4": {"train": "allenai/c4:en:train", "test": "allenai/c4:en:validation"},
    "wikitext2": {
        "train": "Salesforce/wikitext:wikitext-2-raw-v1:train",
        "test": "Salesforce/wikitext:wikitext-2-raw-v1:test",
    },
    "pile": {
        "train": "monology/pile-uncopyrighted::train",
        "test": "monology/pile-uncopyrighted::test",
    },
}
"""Short names for what papers calibrate and evaluate on; C4 has no test split."""


def documents(dataset: str, split: str = "train") -> Iterator[str]:
    """Yield the documents of ``dataset`` in a fixed order.

    What follows ``MAX_CHARACTERS`` of a document is left out, with a warning.

    Args:
        dataset: a file, a folder (searched for files of known suffixes), a key of ``NAMED``, or a
            name on the Hugging Face hub, written ``NAME``, ``NAME:CONFIG`` or
            ``NAME:CONFIG:SPLIT``.
        split: split of a hub data set that names none.

    Raises:
        OfflineError: nothing readable there, no text field, or the hub cannot be reached.
    """
    for origin in origins(dataset, split):
        if isinstance(origin, Path):
            yield from _file_documents(origin)
        else:
            yield from _hub_documents(origin, dataset)


def origins(dataset: str, split: str = "train") -> Sequence[Path | str]:
    """List what a data set is read from: files in a fixed order, or one ``NAME:CONFIG:SPLIT``.

    Raises:
        OfflineError: a folder without text.
    """
    path = local_path(dataset)
    if path.is_file():
        return [path]
    if not path.is_dir():
        name, _, rest = NAMED.get(dataset, {}).get(split, dataset).partition(":")
        config, _, own_split = rest.partition(":")
        return [f"{name}:{config}:{own_split or split}"]
    files = sorted(file for file in path.rglob("*") if _is_text(file))
    if not files:
        raise OfflineError(
            f"folder {dataset!r} holds no text: expected files that end in {', '.join(SUFFIXES)}."
        )
    return files


def _is_text(path: Path) -> bool:
    # Spark writes folders that are named like files. A link that leads nowhere is an error later.
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _file_documents(file: Path) -> Iterator[str]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        yield from _text_of(_parquet_rows(file), str(file))
        return
    try:
        with file.open(encoding="utf-8-sig") as opened:
            if suffix in (".jsonl", ".json"):
                yield from _text_of(_json_rows(opened, file), str(file))
            else:
                yield _beginning(opened.read(MAX_CHARACTERS + 1), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise OfflineError(f"cannot read {file}: {error}. Give UTF-8 text.") from error


def _json_rows(lines: Iterable[str], file: Path) -> Iterator[object]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise OfflineError(
                    f"{file}, line {number}: not JSON ({error.msg}). Each line must be one JSON "
                    f'object with a "{TEXT_FIELD}" field.'
                ) from error


def _parquet_rows(file: Path) -> Iterator[object]:
    import pyarrow
    import pyarrow.parquet

    try:
        opened = pyarrow.parquet.ParquetFile(file)
        known = TEXT_FIELD in opened.schema_arrow.names
        for batch in opened.iter_batches(columns=[TEXT_FIELD] if known else None):
            yield from batch.to_pylist()
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise OfflineError(
            f"cannot read {file} as parquet: {error}. Fetch or write the file again, or name it "
            "by what it holds (.txt or .jsonl)."
        ) from error


def _text_of(rows: Iterable[object], source: str) -> Iterator[str]:
    for row in rows:
        text = row.get(TEXT_FIELD) if isinstance(row, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise OfflineError(
                f'{source} has a row without a string field "{TEXT_FIELD}" (found: {fields}). '
                f'Rename the column that holds the text to "{TEXT_FIELD}".'
            )
        yield _encodable(_beginning(text, source))


def _beginning(document: str, source: str) -> str:
    """Return what is read of a document, with a warning where that is not the whole."""
    if len(document) > MAX_CHARACTERS:
        logger.warning(
            "only the first %s characters of a document of %s are read",
            f"{MAX_CHARACTERS:,}",
            source,
        )
    return document[:MAX_CHARACTERS]


def _encodable(text: str) -> str:
    """Replace surrogates without a partner, which JSON may hold but no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _hub_documents(origin: str, dataset: str) -> Iterator[str]:
    import datasets

    name, config, split = origin.split(":", 2)
    try:
        stream = datasets.load_dataset(name, config or None, split=split, streaming=True)
        yield from _text_of(iter(stream), dataset)
    except OfflineError:
        raise
    except Exception as error:  # the hub client raises too many kinds to list
        raise OfflineError(
            f"data set {dataset!r} is neither a local file or folder, nor could it be read from "
            f"the Hugging Face hub ({first_line(error)}). "
            "Check the name, or give --dataset a local .txt, .jsonl or .parquet file or a folder."
        ) from error
