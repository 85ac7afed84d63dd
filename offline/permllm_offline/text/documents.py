"""Documents of a data set: a text, JSON or parquet file, a folder of them, or a hub name."""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from permllm_offline.errors import OfflineError, first_line
from permllm_offline.run.local_path import local_path
from permllm_offline.text.json_rows import json_rows
from permllm_offline.text.row_text import RowText

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")
"""Of files of a folder; all but the last may be followed by ``.gz``."""

KINDS = f"{', '.join(SUFFIXES[:-1])} (also .gz) or {SUFFIXES[-1]}"
"""What a file may be, as options and messages say it."""

MAX_CHARACTERS = 16 * 8_000_000
"""Characters of one document that are read at most: sixteen for each token that ``calibration``
reads, more than tokens have on average in any language."""

PARQUET_ROWS = 256
"""That are in memory at once: rows may be whole books."""

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


_ANY_ROWS = RowText()


def documents(dataset: str, split: str = "train", rows: RowText = _ANY_ROWS) -> Iterator[str]:
    """Yield the documents of ``dataset`` in a fixed order.

    What follows ``MAX_CHARACTERS`` of a document is left out, with a warning.

    Args:
        dataset: a file, a folder (searched for files of known suffixes), a key of ``NAMED``, or a
            name on the Hugging Face hub, written ``NAME``, ``NAME:CONFIG`` or
            ``NAME:CONFIG:SPLIT``.
        split: split of a hub data set that names none.
        rows: what is read of a row of JSON, parquet or the hub.

    Raises:
        OfflineError: nothing readable there, no text field, or the hub cannot be reached.
    """
    for origin in origins(dataset, split):
        if isinstance(origin, Path):
            yield from _file_documents(origin, rows)
        else:
            yield from _hub_documents(origin, dataset, rows)


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
    return _kind(path) in SUFFIXES and not path.is_dir()


def _kind(file: Path) -> str:
    """The suffix that says what a file holds, whether or not it is compressed."""
    name = file.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    # Parquet is compressed inside, and read from any place of a file.
    return ".gz" if kind == ".parquet" and name.endswith(".gz") else kind


def _file_documents(file: Path, rows: RowText) -> Iterator[str]:
    kind = _kind(file)
    if kind == ".parquet":
        yield from _texts_of(_parquet_rows(file, rows), str(file), rows)
        return
    try:
        with _opened(file) as opened:
            if kind in (".jsonl", ".json"):
                yield from _texts_of(json_rows(opened, file), str(file), rows)
            else:
                yield _beginning(opened.read(MAX_CHARACTERS + 1), str(file))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise OfflineError(
            f"cannot read {file}: {error}. Fetch or compress the file again."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        form = "parquet itself, or UTF-8 text" if kind == ".gz" else "UTF-8 text"
        raise OfflineError(f"cannot read {file}: {error}. Give {form}.") from error


def _opened(file: Path) -> TextIO:
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


def _parquet_rows(file: Path, rows: RowText) -> Iterator[object]:
    import pyarrow
    import pyarrow.parquet

    try:
        opened = pyarrow.parquet.ParquetFile(file)
        names = opened.schema_arrow.names
        field = rows.field_of(names)
        columns = [field] if field in names else None
        for batch in opened.iter_batches(PARQUET_ROWS, columns=columns):
            yield from batch.to_pylist()
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise OfflineError(
            f"cannot read {file} as parquet: {error}. Fetch or write the file again, or name it "
            "by what it holds (.txt or .jsonl)."
        ) from error


def _texts_of(found: Iterable[object], source: str, rows: RowText) -> Iterator[str]:
    for row in found:
        yield _encodable(_beginning(rows.of(row, source), source))


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


def _hub_documents(origin: str, dataset: str, rows: RowText) -> Iterator[str]:
    import datasets

    name, config, split = origin.split(":", 2)
    try:
        stream = datasets.load_dataset(name, config or None, split=split, streaming=True)
        yield from _texts_of(iter(stream), dataset, rows)
    except OfflineError:
        raise
    except Exception as error:  # the hub client raises too many kinds to list
        raise OfflineError(
            f"data set {dataset!r} is neither a local file or folder, nor could it be read from "
            f"the Hugging Face hub ({first_line(error)}). "
            f"Check the name, or give --dataset a local {KINDS} file or a folder."
        ) from error
