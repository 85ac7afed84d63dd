"""How papers read the data sets that they compare perplexities on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.run.local_path import local_path
from permllm_offline.text.documents import NAMED, documents, origins
from permllm_offline.text.row_text import RowText
from permllm_offline.text.windows import cut_windows

logger = logging.getLogger(__name__)

Protocol = Literal["rows", "paper"]
"""Each row tokenized alone, or a data set as papers read it."""

LENGTHS: Mapping[Protocol, int] = {"rows": 512, "paper": 2048}
"""Tokens of a window where nothing is said."""


@dataclass(frozen=True)
class PaperText:
    """How the rows of a data set are joined, how many of them, and the windows that are read."""

    separator: str
    rows: int | None = None
    windows: int | None = None


PAPER_TEXTS: Mapping[str, PaperText] = {
    "wikitext2": PaperText("\n\n"),
    "c4": PaperText(" ", rows=1100, windows=256),
}
"""What the published code of GPTQ, SparseGPT and Wanda does, and most papers after them."""


def paper_name(dataset: str) -> str | None:
    """Key of ``PAPER_TEXTS`` for a data set, or None.

    It may be written out as a name of the hub, and a local copy begins with the key and a dot.
    """
    path = local_path(dataset)
    if path.exists():
        name = path.name.partition(".")[0]
        return name if name in PAPER_TEXTS else None
    found = origins(dataset, "test")
    return next((name for name in PAPER_TEXTS if found == [NAMED[name]["test"]]), None)


def paper_windows(
    dataset: str, tokenizer: Any, sequence_length: int, max_windows: int | None, rows: RowText
) -> Tensor:
    """Cut the windows that papers measure on: the rows joined, tokenized once, nothing overlaps.

    The tokenizer adds what it adds to any text, once: for Llama, a token for the beginning.

    Returns:
        int64 [windows, sequence_length], the tokenizer's ``window_begin`` included, where there is
        one.

    Raises:
        OfflineError: no paper's way of reading is known for this data set.
    """
    name = paper_name(dataset)
    if name is None:
        raise OfflineError(
            f"how papers read data set {dataset!r} is not known: --protocol paper takes "
            f"{', '.join(PAPER_TEXTS)}, or a local copy of their rows whose name begins so "
            "(wikitext2.parquet). Give one of these, or leave the option out."
        )
    text = PAPER_TEXTS[name]
    joined = text.separator.join(islice(documents(dataset, "test", rows), text.rows))
    alone = getattr(tokenizer, "window_begin", None) is None
    tokens = tokenizer(joined, add_special_tokens=alone, verbose=False)["input_ids"]
    windows = cut_windows(tokens, tokenizer, sequence_length)[: text.windows]
    if max_windows is not None and max_windows < len(windows):
        logger.warning(
            "papers measure all %d windows of %s: the perplexity of the first %d is another",
            len(windows),
            dataset,
            max_windows,
        )
    return windows[:max_windows]
