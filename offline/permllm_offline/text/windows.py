"""Windows of tokens, cut from the documents of a data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from permllm_offline.errors import OfflineError
from permllm_offline.text.documents import documents, origins
from permllm_offline.text.row_text import TEXT_FIELD, RowText

logger = logging.getLogger(__name__)

Sampling = Literal["stream", "document"]

SELF = "self"
"""The data set that the dense model writes itself."""

SEPARATOR = "\n\n"
MAX_TOKENS = 8_000_000
"""Tokens read at most: enough to sample from, little enough to hold in memory."""

PIECE_CHARACTERS = 1 << 20
"""Of a document that are tokenized at once: a tokenizer holds many bytes for each of them."""

QUIET_SECONDS = 5.0
"""A progress bar is shown where reading tokens takes longer."""


@dataclass(frozen=True)
class CalibrationWindows:
    """Windows to calibrate on, and further ones of the same data that calibration never sees."""

    calibration: Tensor
    held_out: Tensor


def token_windows(
    texts: Iterable[str], tokenizer: Any, sequence_length: int, max_windows: int | None
) -> Tensor:
    """Cut the joined documents into non-overlapping windows; the ragged end is dropped.

    Without ``max_windows``, what follows ``MAX_TOKENS`` is left out, with a warning.

    Returns:
        int64 [windows, sequence_length], the tokenizer's ``window_begin`` included.
    """
    length = sequence_length - len(_begin(tokenizer))
    limit = MAX_TOKENS if max_windows is None else max_windows * length
    stream: list[int] = []
    remaining = iter(texts)
    for tokens, _ in _tokens(remaining, tokenizer, limit):
        stream.extend(tokens)
        if len(stream) >= limit:
            break
    if max_windows is None and (len(stream) > limit or _is_cut(len(stream), remaining)):
        _warn_of_limit()
    return cut_windows(stream[:limit], tokenizer, sequence_length)


def cut_windows(tokens: Sequence[int], tokenizer: Any, sequence_length: int) -> Tensor:
    """Cut tokens into windows, each behind the tokenizer's ``window_begin``; no ragged end.

    Returns:
        int64 [windows, sequence_length].
    """
    begin = _begin(tokenizer)
    length = sequence_length - len(begin)
    count = len(tokens) // length
    windows = torch.tensor(tokens[: count * length], dtype=torch.long).reshape(count, length)
    return torch.cat([begin.expand(count, -1), windows], dim=1)


def _begin(tokenizer: Any) -> Tensor:
    """What every window begins with: int64 [0] or [1]."""
    token = getattr(tokenizer, "window_begin", None)
    return torch.tensor([] if token is None else [token], dtype=torch.long)


def check_length(tokenizer: Any, sequence_length: int) -> None:
    """Check that the model has positions for a window; the tokenizer's ``positions`` says how many.

    Raises:
        OfflineError: it has not.
    """
    positions = getattr(tokenizer, "positions", None)
    if positions is not None and sequence_length > positions:
        raise OfflineError(
            f"windows of {sequence_length} tokens are longer than the {positions} positions of the "
            "model (max_position_embeddings in its config.json). Give --sequence-length "
            f"{positions} or less."
        )


def check_tokens(tokenizer: Any, windows: Tensor) -> None:
    """Check that the model knows every token; the tokenizer's ``embeddings`` says how many.

    Raises:
        OfflineError: it does not.
    """
    known = getattr(tokenizer, "embeddings", None)
    if known is not None and (largest := int(windows.max())) >= known:
        raise OfflineError(
            f"the tokenizer gives token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), "
            f"and the model knows {known} (vocab_size in its config.json). Take the tokenizer of "
            "this model, or resize its embeddings to the tokenizer."
        )


def check_datasets(datasets: Sequence[str], num_samples: int) -> None:
    """Check that every data set has a share of the windows, and that none is read twice.

    Raises:
        OfflineError: more data sets than windows, or two that read the same text: held-out windows
            of one could be calibration windows of the other.
    """
    if num_samples < len(datasets):
        raise OfflineError(
            f"{num_samples} calibration windows cannot be shared by {len(datasets)} data sets: "
            f"give --num-samples {len(datasets)} or more, or fewer data sets."
        )
    readers: dict[Path | str, int] = {}
    for index, dataset in enumerate(datasets):
        for origin in origins(dataset):
            text = origin.resolve() if isinstance(origin, Path) else origin
            other = readers.setdefault(text, index)
            if other != index:
                raise OfflineError(
                    f"data sets {datasets[other]!r} and {dataset!r} both read {text}: windows "
                    "would come twice, held-out ones among them. Give it once."
                )


def _tokens(texts: Iterable[str], tokenizer: Any, limit: int) -> Iterator[tuple[list[int], bool]]:
    """The tokens of each document, and whether they are all: no more than that are needed."""
    with tqdm(desc="tokens", unit="token", unit_scale=True, delay=QUIET_SECONDS) as progress:
        for text in texts:
            tokens: list[int] = []
            pieces = list(_pieces(text + SEPARATOR))
            while pieces and len(tokens) <= limit:
                piece = pieces.pop(0)
                # verbose=False: a document longer than the context is cut into windows right after.
                encoded = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                tokens.extend(encoded)
                progress.update(len(encoded))
            yield tokens, not pieces


def _pieces(text: str) -> Iterator[str]:
    """Cut a long document where lines end, if it has any."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        newline = text.rfind("\n", start, start + PIECE_CHARACTERS)
        end = start + PIECE_CHARACTERS if newline < start else newline + 1
        yield text[start:end]
        start = end
    yield text[start:]


def _is_cut(tokens: int, remaining: Iterator[str]) -> bool:
    """Whether the limit was reached before the last document."""
    return tokens >= MAX_TOKENS and next(remaining, None) is not None


def _warn_of_limit() -> None:
    logger.warning("only the first %s tokens of the text are read", f"{MAX_TOKENS:,}")


def document_windows(
    texts: Iterable[str], tokenizer: Any, sequence_length: int, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Cut one window at a random place of each of ``count`` random documents.

    This is how SparseGPT, Wanda and the PermLLM paper sample: documents that are shorter than a
    window are passed over, and a document can be drawn again. Documents after the one that reaches
    ``MAX_TOKENS`` are left out, with a warning.

    Returns:
        int64 [count, sequence_length] (of no rows where no document is long enough), and the
        number of the document that each is from.
    """
    begin = _begin(tokenizer)
    length = sequence_length - len(begin)
    long: list[list[int]] = []
    limited = False
    total = 0
    remaining = iter(texts)
    for tokens, whole in _tokens(remaining, tokenizer, MAX_TOKENS):
        if len(tokens) > length:
            long.append(tokens)
        limited = not whole
        total += len(tokens)
        if total >= MAX_TOKENS:
            break
    if limited or _is_cut(total, remaining):
        _warn_of_limit()
    if not long:
        return torch.empty((0, sequence_length), dtype=torch.long), torch.empty(0)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(long), (count,), generator=generator)
    windows = []
    for document in chosen.tolist():
        last = len(long[document]) - length
        start = int(torch.randint(last + 1, (1,), generator=generator))
        windows.append(long[document][start : start + length])
    cut = torch.tensor(windows, dtype=torch.long)
    return torch.cat([begin.expand(count, -1), cut], dim=1), chosen


def sample_windows(
    datasets: Sequence[str],
    tokenizer: Any,
    *,
    num_samples: int,
    sequence_length: int,
    seed: int,
    num_held_out: int = 0,
    sampling: Sampling = "stream",
    text_field: str = TEXT_FIELD,
    own_text: Callable[[int], Tensor] | None = None,
) -> CalibrationWindows:
    """Draw calibration windows at random from data sets, an equal share from each.

    Args:
        datasets: what ``text.documents.documents`` reads.
        tokenizer: of the model, from ``tokenizer.load_tokenizer``.
        num_samples: calibration windows.
        sequence_length: tokens per window.
        seed: of the draw; the same seed gives the same windows.
        num_held_out: further windows, as many of these as the data allow.
        sampling: ``stream`` joins the documents and never draws a token twice; ``document`` is
            ``document_windows``.
        text_field: what is read of a row, see ``row_text.RowText``.
        own_text: samples a number of windows from the dense model, for the data set ``self``.

    Raises:
        OfflineError: too few windows in a data set, windows that the model has no positions for, or
            tokens that it does not know.
    """
    check_length(tokenizer, sequence_length)
    parts = [
        _sample(
            dataset,
            RowText(text_field, tokenizer),
            _share(num_samples, len(datasets), index),
            sequence_length,
            seed,
            _share(num_held_out, len(datasets), index),
            sampling,
            own_text,
        )
        for index, dataset in enumerate(datasets)
    ]
    calibration = torch.cat([part.calibration for part in parts])
    if len(parts) > 1:  # a step of learning should see all sources
        generator = torch.Generator().manual_seed(seed)
        calibration = calibration[torch.randperm(len(calibration), generator=generator)]
    return CalibrationWindows(calibration, torch.cat([part.held_out for part in parts]))


def writes_itself(dataset: str) -> bool:
    """Whether a data set is text of the dense model; a file or folder of that name comes first."""
    return dataset == SELF and not Path(SELF).exists()


def own_shares(datasets: Sequence[str], num_samples: int, num_held_out: int) -> list[int]:
    """Windows that the dense model writes, held-out ones included, for each data set ``self``."""
    parts = len(datasets)
    return [
        _share(num_samples, parts, index) + _share(num_held_out, parts, index)
        for index, dataset in enumerate(datasets)
        if writes_itself(dataset)
    ]


def _share(total: int, parts: int, index: int) -> int:
    return total // parts + (index < total % parts)


def _sample(
    dataset: str,
    rows: RowText,
    num_samples: int,
    sequence_length: int,
    seed: int,
    num_held_out: int,
    sampling: Sampling,
    own_text: Callable[[int], Tensor] | None,
) -> CalibrationWindows:
    if own_text is not None and writes_itself(dataset):
        sampled = own_text(num_samples + num_held_out)
        return CalibrationWindows(sampled[:num_samples], sampled[num_samples:])
    texts, tokenizer = documents(dataset, rows=rows), rows.tokenizer
    if sampling == "document":
        count = num_samples + num_held_out
        drawn, origin = document_windows(texts, tokenizer, sequence_length, count, seed)
        if len(drawn) == 0:
            raise OfflineError(
                f"data set {dataset!r} has no document of more than {sequence_length} tokens: "
                "give sampling stream, longer documents, or a lower --sequence-length."
            )
        check_tokens(tokenizer, drawn)
        _warn_of_few_documents(dataset, origin)
        calibration, rest = drawn[:num_samples], drawn[num_samples:]
        unseen = ~torch.isin(origin[num_samples:], origin[:num_samples])
        return CalibrationWindows(calibration, rest[unseen])
    windows = token_windows(texts, tokenizer, sequence_length, None)
    if len(windows) < num_samples:
        raise OfflineError(
            f"data set {dataset!r} is too short: it gives {len(windows)} of the {num_samples} "
            f"windows of {sequence_length} tokens to calibrate on (none where the tokenizer reads "
            "nothing in it). Give more text, --effort low where the method distils, or a lower "
            "--num-samples or --sequence-length."
        )
    check_tokens(tokenizer, windows)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(windows), generator=generator)
    chosen, rest = order[:num_samples], order[num_samples : num_samples + num_held_out]
    return CalibrationWindows(windows[chosen], windows[rest])


def _warn_of_few_documents(dataset: str, origin: Tensor) -> None:
    documents_drawn = len(origin.unique())
    if 2 * documents_drawn < len(origin):
        logger.warning(
            "%d windows of data set %r are from %d of its documents, which may overlap: what is "
            "held out to choose the best step is then no unseen text, and no perplexity is "
            "measured on documents that were calibrated on. Give more documents of more than a "
            "window, or sampling stream.",
            len(origin),
            dataset,
            documents_drawn,
        )


def require_windows(count: int, per_step: int, held_out: int, purpose: str, chosen: str) -> None:
    """Check that `count` calibration windows suffice for a step and for those held out from it.

    Raises:
        OfflineError: they do not; `purpose` and what the held-out ones choose are named.
    """
    if count < held_out + per_step:
        raise OfflineError(
            f"{count} calibration windows are too few to {purpose}: a step takes {per_step} and "
            f"{held_out} are held out to choose the best {chosen}. Raise --num-samples."
        )
