"""Tokenises rows once, and reads them memory-mapped from a cache afterwards."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
from transformers import PreTrainedTokenizerBase

from training.consts import LEDGER_FILE
from training.data.encoding import encode_prompts, encode_text, surrounding_ids
from training.data.ledger import (
    EMPTY_INSTRUCTION,
    EMPTY_RESPONSE,
    PROMPT_TOO_LONG,
    RESPONSE_CUT,
    Ledger,
    check_dropped,
    length_histogram,
)
from training.data.prompt import END_KEY, RESPONSE_KEY, response_piece
from training.data.rows import Columns, check_source, local_files, read_columns
from training.errors import DataError
from training.files import fingerprint, write_folder

ROWS_PER_TOKENIZER_CALL = 2000
COLUMNS = ["row", "input_ids", "response_start", "length"]  # of the tokenised dataset
# The cached rows depend on this code as well: an edit of one of these files invalidates the cache.
SOURCES = [
    Path(__file__).with_name(f"{name}.py")
    for name in (
        "table",
        "json_rows",
        "formats",
        "folders",
        "columns",
        "rows",
        "prompt",
        "encoding",
        "tokens",
        "ledger",
    )
]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, columns: Columns, ledger: Ledger, keep_truncated: bool = False
) -> Iterator[tuple[int, list[int], int]]:
    """Yields (row number, input_ids, response_start) of every row kept, and counts every row in `ledger`.

    `input_ids[response_start]` is the first token of the response. The last token is the end key, except in rows that
    `keep_truncated` allows to be cut at `ledger.max_length`.
    """
    response_key, end_key = (tokenizer.convert_tokens_to_ids(key) for key in (RESPONSE_KEY, END_KEY))
    for start in range(0, len(columns), ROWS_PER_TOKENIZER_CALL):
        part = slice(start, start + ROWS_PER_TOKENIZER_CALL)
        heads, bodies = encode_prompts(tokenizer, columns.instruction[part], columns.input[part])
        responses = encode_text(tokenizer, map(response_piece, columns.output[part]))
        for offset, (head, body, response) in enumerate(zip(heads, bodies, responses, strict=True)):
            row = start + offset
            ledger.rows_read += 1
            if not columns.output[row].strip():
                ledger.drop(EMPTY_RESPONSE, row + 1)
                continue
            if not columns.instruction[row].strip():
                ledger.drop(EMPTY_INSTRUCTION, row + 1)
                continue
            response_start = len(head) + len(body) + 1
            ids = [*head, *body, response_key, *response, end_key]
            if response_start >= ledger.max_length:
                ledger.drop(PROMPT_TOO_LONG, row + 1)
                continue
            if len(ids) > ledger.max_length:
                if not keep_truncated:
                    ledger.drop(RESPONSE_CUT, row + 1)
                    continue
                ids = ids[: ledger.max_length]
                ledger.rows_truncated += 1
            ledger.rows_kept += 1
            yield row + 1, ids, response_start


def prepare_dataset(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    keep_truncated: bool = False,
    max_dropped_fraction: float = 0.1,
    cache_root: Path | None = None,
    selection: Mapping[str, str] | None = None,
    positions: int | None = None,
) -> tuple[datasets.Dataset, Ledger]:
    """Tokenises the rows of `source`, or reads them from the cache.

    The first call writes the cache; later calls and other ranks read it. Its key covers data, prompt, tokenizer,
    `max_length` and `keep_truncated`. `selection` is that of `read_columns`, `positions` that of
    `check_dropped`.

    Returns:
        (rows, ledger). The rows are memory-mapped, in the order of the source:
        `{row: int64, input_ids: list[int32], response_start: int32, length: int32}`, where `row` counts from 1.

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
    check_dropped(ledger, max_dropped_fraction, positions)
    return rows, ledger


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
        ledger = Ledger(**json.loads((target / LEDGER_FILE).read_text()))
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
    starts: list[int] = []
    for number, ids, start in encode_rows(tokenizer, columns, ledger, keep_truncated):
        numbers.append(number)
        rows.append(np.asarray(ids, dtype=np.int32))
        starts.append(start)
    sizes = np.array([len(ids) for ids in rows], dtype=np.int64)
    ledger.tokens = int(sizes.sum())
    ledger.response_tokens = ledger.tokens - int(np.sum(starts, dtype=np.int64))
    ledger.longest_row = int(sizes.max(initial=0))
    ledger.length_histogram = length_histogram(sizes)
    values = np.concatenate([np.empty(0, np.int32), *rows])
    table = pa.table(
        {
            "row": pa.array(numbers, pa.int64()),
            "input_ids": pa.LargeListArray.from_arrays(np.concatenate([[0], sizes.cumsum()]), values),
            "response_start": pa.array(starts, pa.int32()),
            "length": pa.array(sizes, pa.int32()),
        }
    )
    with write_folder(target, is_complete=_read_cache) as folder:
        datasets.Dataset(table).save_to_disk(str(folder))
        ledger.save(folder / LEDGER_FILE)


def marked_sample(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], response_start: int) -> str:
    """Decodes one row, with the supervised tokens between « and »."""
    prompt, response = input_ids[:response_start], input_ids[response_start:]
    return f"{tokenizer.decode(prompt)}«{tokenizer.decode(response)}»"
