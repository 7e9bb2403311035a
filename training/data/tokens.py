"""Rows to token ids: tokenised once, cached, memory-mapped."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from training.consts import DEMO
from training.data.ledger import (
    EMPTY_RESPONSE,
    PROMPT_TOO_LONG,
    RESPONSE_CUT,
    Ledger,
    check_dropped,
    length_histogram,
)
from training.data.prompt import END_KEY, RESPONSE_KEY, encode_prompts, encode_text, leading_ids
from training.data.rows import Columns, read_columns, too_few_rows
from training.errors import DataError

ROWS_PER_TOKENIZER_CALL = 2000
COLUMNS = ["row", "input_ids", "response_start", "length"]  # of the tokenised rows
CACHE_FORMAT = 2  # raise it whenever the same rows would give other ids


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, columns: Columns, ledger: Ledger, keep_truncated: bool = False
) -> Iterator[tuple[int, list[int], int]]:
    """Yields (row number, input_ids, response_start) of every row kept; writes each row's fate in `ledger`.

    `input_ids[response_start]` is the first token of the response; the last token is the end key, unless
    the row was cut at `ledger.max_length` and `keep_truncated` allowed it.
    """
    response_key, end_key = (tokenizer.convert_tokens_to_ids(key) for key in (RESPONSE_KEY, END_KEY))
    for begin in range(0, len(columns), ROWS_PER_TOKENIZER_CALL):
        part = slice(begin, begin + ROWS_PER_TOKENIZER_CALL)
        heads, bodies = encode_prompts(tokenizer, columns.instruction[part], columns.input[part])
        responses = encode_text(tokenizer, [f"{text}\n\n" for text in columns.output[part]])
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

    They stand in the order of the source, in which `row` counts from 1; `length` is that of `input_ids`.

    Done once and cached under a key of data, tokenizer and lengths; a second call, or another rank, reads
    the cache. Raises DataError when more than `max_dropped_fraction` of the rows had to be dropped.
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
    """Rows are a few objects each and hold no cycles: Python's search for some is a sixth of the time they take."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_cache(target: Path) -> tuple[datasets.Dataset, Ledger] | None:
    """What lies in a cache folder; None where nothing does, or not all: files may have been deleted or cut."""
    try:
        ledger = Ledger(**json.loads((target / "ledger.json").read_text()))
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
    """A local file is known by its bytes, so that ranks that only read the cache need not parse it."""
    digest = hashlib.sha256()
    if columns is None:
        digest.update(Path(source).suffix.lower().encode())
        try:
            with open(source, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{source}: cannot be read ({error})") from error
    else:
        for column in (columns.instruction, columns.input, columns.output):
            digest.update(repr(column).encode())
    digest.update(_vocabulary(tokenizer).encode())
    digest.update(repr((CACHE_FORMAT, leading_ids(tokenizer), max_length, keep_truncated)).encode())
    return digest.hexdigest()[:32]


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that decides the ids. The padding and truncation state of the moment does not."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({key: state[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")})


def _write_cache(
    target: Path, columns: Columns, tokenizer: PreTrainedTokenizerBase, ledger: Ledger, keep_truncated: bool
) -> None:
    """Written beside the target and renamed, so a killed writer leaves nothing that looks like a cache."""
    numbers: list[int] = []
    flat: list[np.ndarray] = []
    lengths: list[int] = []
    starts: list[int] = []
    for number, ids, start in encode_rows(tokenizer, columns, ledger, keep_truncated):
        numbers.append(number)
        flat.append(np.asarray(ids, dtype=np.int32))
        lengths.append(len(ids))
        starts.append(start)
    sizes = np.asarray(lengths, dtype=np.int64)
    ledger.tokens = int(sizes.sum())
    ledger.response_tokens = ledger.tokens - int(np.sum(starts, dtype=np.int64))
    ledger.longest_row = int(sizes.max(initial=0))
    ledger.length_histogram = length_histogram(sizes)
    values = np.concatenate(flat) if flat else np.empty(0, np.int32)
    table = pa.table(
        {
            "row": pa.array(numbers, pa.int64()),
            "input_ids": pa.LargeListArray.from_arrays(np.concatenate([[0], sizes.cumsum()]), values),
            "response_start": pa.array(starts, pa.int32()),
            "length": pa.array(sizes, pa.int32()),
        }
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
    try:
        datasets.Dataset(table).save_to_disk(str(partial))
        ledger.save(partial / "ledger.json")
        try:
            os.replace(partial, target)
        except OSError:  # something is there already: another process has finished first, or half a cache
            if _read_cache(target) is None:
                shutil.rmtree(target)
                os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
