"""Turns rows into token ids: tokenised once, cached, memory-mapped."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
from transformers import PreTrainedTokenizerBase

from training.consts import DEMO, LEDGER_FILE
from training.data.ledger import (
    EMPTY_RESPONSE,
    PROMPT_TOO_LONG,
    RESPONSE_CUT,
    Ledger,
    check_dropped,
    length_histogram,
)
from training.data.prompt import (
    END_KEY,
    RESPONSE_KEY,
    encode_prompts,
    encode_text,
    leading_ids,
    response_piece,
)
from training.data.rows import Columns, read_columns, too_few_rows
from training.errors import DataError
from training.files import fingerprint, write_folder

ROWS_PER_TOKENIZER_CALL = 2000
COLUMNS = ["row", "input_ids", "response_start", "length"]  # of the tokenised rows
# What decides rows and ids, beside data and tokenizer: an edit of these files makes the cached rows anew.
SOURCES = [Path(__file__).with_name(name) for name in ("rows.py", "prompt.py", "tokens.py", "ledger.py")]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, columns: Columns, ledger: Ledger, keep_truncated: bool = False
) -> Iterator[tuple[int, list[int], int]]:
    """Yields (row number, input_ids, response_start) of every row kept; counts every row in `ledger`.

    `input_ids[response_start]` is the first token of the response; the last token is the end key, unless
    the row was cut at `ledger.max_length` and `keep_truncated` allowed it.
    """
    response_key, end_key = (tokenizer.convert_tokens_to_ids(key) for key in (RESPONSE_KEY, END_KEY))
    for begin in range(0, len(columns), ROWS_PER_TOKENIZER_CALL):
        part = slice(begin, begin + ROWS_PER_TOKENIZER_CALL)
        heads, bodies = encode_prompts(tokenizer, columns.instruction[part], columns.input[part])
        responses = encode_text(tokenizer, map(response_piece, columns.output[part]))
        for offset, (head, body, response) in enumerate(zip(heads, bodies, responses, strict=True)):
            row = begin + offset
            ledger.rows_read += 1
            if not columns.output[row].strip():
                ledger.drop(EMPTY_RESPONSE, row + 1)
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
) -> tuple[datasets.Dataset, Ledger]:
    """The tokenised rows, memory-mapped: `{row: int64, input_ids: list[int32], response_start: int32, length: int32}`.

    They are in the order of the source, in which `row` counts from 1; `length` is that of `input_ids`.

    The rows are tokenised once and cached; a second call, or another rank, reads the cache. Another prompt, tokenizer,
    length or other data gives another cache. Raises DataError when more than `max_dropped_fraction` of the rows had
    to be dropped.
    """
    root = cache_root or Path(datasets.config.HF_DATASETS_CACHE) / "dolly"
    columns = None if source != DEMO and os.path.isfile(source) else read_columns(source)
    target = root / _fingerprint(source, columns, tokenizer, max_length, keep_truncated)
    cached = _read_cache(target)
    if cached is None:
        with _no_search_for_cycles():
            columns = columns or read_columns(source)
            try:
                _write_cache(target, columns, tokenizer, Ledger(source, max_length), keep_truncated)
            except OSError as error:
                raise DataError(
                    f"{root}: the tokenised rows cannot be written there ({error}). "
                    "Make room, or name another folder with export HF_DATASETS_CACHE=..."
                ) from error
        cached = _read_cache(target)
        if cached is None:
            raise DataError(f"{target}: what was written there cannot be read again. Check the disk")
    rows, ledger = cached
    ledger.source = source  # the same rows may have been cached under another path
    check_dropped(ledger, max_dropped_fraction)
    return rows, ledger


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """Pauses Python's search for cycles. Rows have none, and the search would take a sixth of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_cache(target: Path) -> tuple[datasets.Dataset, Ledger] | None:
    """The rows and ledger in a cache folder; None where there are none, or a file is missing or damaged."""
    try:
        ledger = Ledger(**json.loads((target / LEDGER_FILE).read_text()))
        if ledger.rows_kept + sum(ledger.dropped.values()) != ledger.rows_read or not ledger.rows_read:
            return None
        if not ledger.rows_kept:  # no file was written for them
            return datasets.Dataset.from_dict({name: [] for name in COLUMNS}), ledger
        rows = datasets.load_from_disk(str(target))
    except Exception:  # a dozen unrelated types; what cannot be read is made anew
        return None
    return (rows, ledger) if len(rows) == ledger.rows_kept and rows.column_names == COLUMNS else None


def _fingerprint(
    source: str,
    columns: Columns | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    keep_truncated: bool,
) -> str:
    """The key of the tokenised rows: it changes with whatever decides them.

    A local file is known by its bytes, so that ranks that only read the cache need not parse it.
    """
    data: list[Path | str] = (
        [Path(source).suffix.lower(), Path(source)] if columns is None else [repr(columns)]
    )
    state = repr((tokenizers.__version__, leading_ids(tokenizer), max_length, keep_truncated))
    try:
        return fingerprint(*SOURCES, *data, _vocabulary(tokenizer), state)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error})") from error


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything in a tokenizer that decides ids. Its padding and truncation settings of the moment do not."""
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
    with write_folder(target, is_whole=_read_cache) as folder:
        datasets.Dataset(table).save_to_disk(str(folder))
        ledger.save(folder / LEDGER_FILE)


def split_held_out(
    rows: datasets.Dataset, test_size: int, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(training rows, held-out rows), shuffled and split by the two calls that Dolly made."""
    if len(rows) < 2:
        raise DataError(f"--training-dataset: {too_few_rows(len(rows))}. Name one with more")
    if not 0 < test_size < len(rows):
        raise DataError(
            f"--test-size {test_size:,} of {len(rows):,} rows leaves "
            f"{'none held out' if test_size <= 0 else 'none to train on'}. Try --test-size {max(1, len(rows) // 10):,}"
        )
    parts = rows.shuffle(seed=seed).train_test_split(test_size=test_size, seed=seed)
    return parts["train"], parts["test"]


def marked_sample(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], response_start: int) -> str:
    """One row as the model sees it, the supervised tokens between « and »."""
    prompt, response = input_ids[:response_start], input_ids[response_start:]
    return f"{tokenizer.decode(prompt)}«{tokenizer.decode(response)}»"
