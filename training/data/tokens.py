"""Tokenises rows once, and reads them memory-mapped from a cache afterwards."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
from transformers import PreTrainedTokenizerBase

from training.consts import LEDGER_FILE
from training.data.conversations import row_turns
from training.data.encoding import encode_turns, surrounding_ids
from training.data.ledger import (
    EMPTY_INSTRUCTION,
    EMPTY_RESPONSE,
    PROMPT_TOO_LONG,
    RESPONSE_CUT,
    Ledger,
    check_dropped,
    length_histogram,
    total_of,
)
from training.data.prompt import END_KEY, RESPONSE_KEY
from training.data.rows import (
    TRAINED_TOO,
    Columns,
    check_source,
    check_sources,
    local_files,
    read_columns,
    selection_of,
)
from training.errors import DataError
from training.files import fingerprint, write_folder

ROWS_PER_TOKENIZER_CALL = 2000
# Of a response with its end key: the place of its first token, and the place behind its last.
Span = tuple[int, int]
COLUMNS = ["row", "input_ids", "response_spans", "length"]  # of the tokenised dataset
# The cached rows depend on this code as well: an edit of one of these files invalidates the cache.
SOURCES = [
    Path(__file__).with_name(f"{name}.py")
    for name in (
        "table",
        "json_rows",
        "formats",
        "folders",
        "columns",
        "conversations",
        "rows",
        "prompt",
        "encoding",
        "tokens",
        "ledger",
    )
]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, columns: Columns, ledger: Ledger, keep_truncated: bool = False
) -> Iterator[tuple[int, list[int], list[Span]]]:
    """Yields (row number, input_ids, response spans) of every row kept, and counts every row in `ledger`.

    There is a span for each turn that is kept. A conversation that is too long loses whole turns at its end. The last
    token is an end key, except in rows that `keep_truncated` allows to be cut at `ledger.max_length`.
    """
    keys = tokenizer.convert_tokens_to_ids([RESPONSE_KEY, END_KEY])
    for start in range(0, len(columns), ROWS_PER_TOKENIZER_CALL):
        rows = range(start, min(start + ROWS_PER_TOKENIZER_CALL, len(columns)))
        texts = [row_turns(columns, row) for row in rows]
        for row, turns, pieces in zip(rows, texts, encode_turns(tokenizer, texts), strict=True):
            ledger.rows_read += 1
            if row in columns.unusable:
                ledger.drop_unusable(columns.unusable[row], row + 1)
            elif reason := _lack(turns):
                ledger.drop(reason, row + 1)
            elif encoded := _join(pieces, keys, row + 1, ledger, keep_truncated):
                ledger.rows_kept += 1
                yield row + 1, *encoded


def _lack(turns: Sequence[tuple[str, str, str]]) -> str | None:
    """Why a row is dropped whatever its length: an answer or a question is blank."""
    lack = None
    for instruction, _, output in turns:
        if not output.strip():
            return EMPTY_RESPONSE
        if not instruction.strip():
            lack = EMPTY_INSTRUCTION
    return lack


def _join(
    turns: Sequence[tuple[list[int], list[int], list[int]]],
    keys: Sequence[int],
    row: int,
    ledger: Ledger,
    keep_truncated: bool,
) -> tuple[list[int], list[Span]] | None:
    """Input ids and response spans of a row, from (head, body, response) of its turns; None if it is dropped.

    `keys` are the ids of response key and end key.
    """
    response_key, end_key = keys
    ids: list[int] = []
    spans: list[Span] = []
    for head, body, response in turns:
        begin = len(ids) + len(head) + len(body) + 1
        end = begin + len(response) + 1
        if end > ledger.max_length:
            if spans:
                break
            if begin >= ledger.max_length or not keep_truncated:
                ledger.drop(PROMPT_TOO_LONG if begin >= ledger.max_length else RESPONSE_CUT, row)
                return None
            ids = [*head, *body, response_key, *response][: ledger.max_length]
            spans.append((begin, ledger.max_length))
            ledger.rows_truncated += 1
            break
        turn = [*head, *body, response_key, *response, end_key]
        if spans:
            ids += turn
        else:
            ids = turn  # most rows have one turn, which is not copied
        spans.append((begin, end))
    ledger.count_turns(len(spans), len(turns))
    return ids, spans


def prepare_dataset(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    keep_truncated: bool = False,
    max_dropped_fraction: float = 0.1,
    cache_root: Path | None = None,
    selection: Mapping[str, str] | None = None,
    positions: int | None = None,
    drop_unusable: bool = False,
) -> tuple[datasets.Dataset, Ledger]:
    """Tokenises the rows of `source`, or reads them from the cache.

    The first call writes the cache; later calls and other ranks read it. Its key covers data, prompt, tokenizer,
    `max_length` and `keep_truncated`. `selection` is that of `read_columns`, `positions` and `drop_unusable` are those
    of `check_dropped`.

    Returns:
        (rows, ledger). The rows are memory-mapped, in the order of the source:
        `{row: int64, input_ids: list[int32], response_spans: list[[int32, int32]], length: int32}`, where `row` counts
        from 1, and `input_ids[start:end]` of each span is a response with its end key.

    Raises:
        DataError: the source cannot be read, more than `max_dropped_fraction` of its rows had to be dropped, or the
            cache cannot be written.
    """
    root = cache_root or Path(datasets.config.HF_DATASETS_CACHE) / "dolly"
    check_source(source, selection or {})
    files = local_files(source)
    columns = None if files else read_columns(source, selection)
    target = root / _fingerprint(source, columns or files or {}, tokenizer, max_length, keep_truncated)
    cached = _read_cache(target)
    if cached is None:
        with _garbage_collection_paused():
            columns = columns or read_columns(source)
            ledger = Ledger(source, max_length, files=columns.files, not_read=columns.not_read)
            try:
                _write_cache(target, columns, tokenizer, ledger, keep_truncated)
            except OSError as error:
                raise DataError(
                    f"{root}: the tokenised rows cannot be written there ({error}). "
                    "Make room, or name another folder with export HF_DATASETS_CACHE=..."
                ) from error
        cached = _read_cache(target)
        if cached is None:
            raise DataError(f"{target}: the tokenised rows were written but cannot be read. Check the disk")
    rows, ledger = cached
    ledger.source = source  # the cached rows may come from another path with the same content
    check_dropped(ledger, max_dropped_fraction, positions, drop_unusable)
    return rows, ledger


def prepare_sources(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    keep_truncated: bool = False,
    max_dropped_fraction: float = 0.1,
    selection: Mapping[str, str] | None = None,
    positions: int | None = None,
    drop_unusable: bool = False,
) -> tuple[datasets.Dataset, Ledger]:
    """Tokenises the rows of each source, or reads them from its cache, and joins them in this order.

    The arguments are those of `prepare_dataset`. The `selection` is for the sources on the Hub.

    Returns:
        (rows, ledger). The rows of a single source are those of `prepare_dataset`. Those of several have one more
        column, `source: int32`, which counts from 0; `row` is the number within the source.

    Raises DataError with every source that is missing or named twice, or else for the first that cannot be used or has
    the rows of an earlier one.
    """
    check_sources(sources, selection or {})
    parts, ledgers = list[datasets.Dataset](), list[Ledger]()
    for number, source in enumerate(sources):
        rows, ledger = prepare_dataset(
            source,
            tokenizer,
            max_length,
            keep_truncated,
            max_dropped_fraction,
            selection=selection_of(source, sources, selection or {}),
            positions=positions,
            drop_unusable=drop_unusable,
        )
        for earlier, part in zip(sources, parts, strict=False):
            if len(part) == len(rows) and part.data["input_ids"].equals(rows.data["input_ids"]):
                raise DataError(f"{source}: has the same rows as {earlier}{TRAINED_TOO}")
        parts.append(
            rows if len(sources) == 1 else rows.add_column("source", np.full(len(rows), number, np.int32))
        )
        ledgers.append(ledger)
    joined = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    return joined, total_of(ledgers)


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pauses the garbage collector. It would take a sixth of the tokenising time, and rows have no reference cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_cache(target: Path) -> tuple[datasets.Dataset, Ledger] | None:
    """Rows and ledger from a cache folder; None if a file is missing or damaged."""
    try:
        ledger = Ledger.read(target / LEDGER_FILE)
        if ledger.rows_kept + sum(ledger.dropped.values()) != ledger.rows_read or not ledger.rows_read:
            return None
        if not ledger.rows_kept:  # datasets writes no file for zero rows
            return datasets.Dataset.from_dict({name: [] for name in COLUMNS}), ledger
        rows = datasets.load_from_disk(str(target))
    except Exception:  # many unrelated types; an unreadable cache is written again
        return None
    return (rows, ledger) if len(rows) == ledger.rows_kept and rows.column_names == COLUMNS else None


def _fingerprint(
    source: str,
    data: Columns | dict[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    keep_truncated: bool,
) -> str:
    """Cache key of the tokenised rows. It changes with everything that affects them.

    Local files enter with their bytes, so that ranks which only read the cache need not parse them, and with the keys
    of `local_files`, because the ledger names the files of a folder.
    """
    parts = [repr(list(data)), *data.values()] if isinstance(data, dict) else [repr(data)]
    state = repr((tokenizers.__version__, surrounding_ids(tokenizer), max_length, keep_truncated))
    try:
        return fingerprint(*SOURCES, *parts, _vocabulary(tokenizer), state)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error})") from error


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """The parts of a tokenizer that determine ids. Its current padding and truncation settings do not."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({key: state[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")})


def _write_cache(
    target: Path, columns: Columns, tokenizer: PreTrainedTokenizerBase, ledger: Ledger, keep_truncated: bool
) -> None:
    numbers: list[int] = []
    rows: list[np.ndarray] = []
    spans: list[Span] = []
    counts: list[int] = []
    for number, ids, of_row in encode_rows(tokenizer, columns, ledger, keep_truncated):
        numbers.append(number)
        rows.append(np.asarray(ids, dtype=np.int32))
        spans += of_row
        counts.append(len(of_row))
    sizes = np.array([len(ids) for ids in rows], dtype=np.int64)
    edges = np.array(spans, dtype=np.int32).reshape(-1, 2)
    ledger.unanswered = len(columns.unanswered)
    ledger.tokens = int(sizes.sum())
    ledger.response_tokens = int(np.diff(edges).sum())
    ledger.longest_row = int(sizes.max(initial=0))
    ledger.length_histogram = length_histogram(sizes)
    values = np.concatenate([np.empty(0, np.int32), *rows])
    table = pa.table(
        {
            "row": pa.array(numbers, pa.int64()),
            "input_ids": pa.LargeListArray.from_arrays(np.concatenate([[0], sizes.cumsum()]), values),
            "response_spans": pa.ListArray.from_arrays(
                np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int32),
                pa.FixedSizeListArray.from_arrays(edges.ravel(), 2),
            ),
            "length": pa.array(sizes, pa.int32()),
        }
    )
    with write_folder(target, is_complete=_read_cache) as folder:
        datasets.Dataset(table).save_to_disk(str(folder))
        ledger.save(folder / LEDGER_FILE)


def marked_sample(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], spans: Iterable[Sequence[int]]
) -> str:
    """Decodes one row, with the supervised tokens between « and »."""
    text, last = "", 0
    for start, end in spans:
        text += f"{tokenizer.decode(input_ids[last:start])}«{tokenizer.decode(input_ids[start:end])}»"
        last = end
    return text
