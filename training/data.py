"""Rows to prompts to token ids: read, render, tokenise once, keep a ledger of every row's fate.

Each row is tokenised in pieces. The control tokens are put between the pieces by id and never looked for
in text, so a user's "### End" stays ordinary text, and where the response starts is known, not searched.
The pieces give the same ids as tokenising the whole prompt at once, because added tokens split the text
before the byte-pair merges run.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from transformers import PreTrainedTokenizerBase

from training.consts import (
    DEMO,
    END_KEY,
    INPUT_KEY,
    INSTRUCTION_KEY,
    INTRO,
    INTRO_WITH_INPUT,
    RESPONSE_KEY,
)
from training.rows import Columns, DataError, read_columns, too_few_rows

logger = logging.getLogger(__name__)

EMPTY_RESPONSE = "empty response"
PROMPT_TOO_LONG = "prompt alone fills max_length"
RESPONSE_CUT = "response would be cut at max_length"
HISTOGRAM_EDGES = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
ROWS_PER_TOKENIZER_CALL = 2000
COLUMNS = ["row", "input_ids", "response_start", "length"]  # of the tokenised rows
CACHE_FORMAT = 2  # raise it whenever the same rows would give other ids


@dataclass
class Ledger:
    """What became of every row. Row numbers count from 1 in the order of the source."""

    source: str
    max_length: int
    rows_read: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped_rows: dict[str, list[int]] = field(default_factory=dict)
    rows_truncated: int = 0
    tokens: int = 0
    response_tokens: int = 0
    longest_row: int = 0
    length_histogram: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, row: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        first = self.first_dropped_rows.setdefault(reason, [])
        if len(first) < 10:
            first.append(row)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.rows_read:,} rows read, {self.rows_kept:,} kept, "
            f"{self.rows_truncated:,} truncated at {self.max_length:,} tokens; {self.tokens:,} tokens, "
            f"{self.response_tokens:,} of them in responses, longest row {self.longest_row:,}"
        ]
        for reason, count in self.dropped.items():
            rows = ", ".join(map(str, self.first_dropped_rows[reason]))
            lines.append(f"  dropped {count:,}: {reason} (first rows: {rows})")
        lines.append("  tokens a row: " + "  ".join(f"{k}: {v:,}" for k, v in self.length_histogram.items()))
        return "\n".join(lines)


# --- rows -> prompts ---------------------------------------------------------------------------------


def render_prompt(instruction: str, input: str | None = None) -> str:
    """The prompt as text, up to and including the response key."""
    intro, body = _prompt_pieces(instruction, input)
    return intro + INSTRUCTION_KEY + body + RESPONSE_KEY


def _prompt_pieces(instruction: str, input: str | None) -> tuple[str, str]:
    """The text before the instruction key, and the text between it and the response key."""
    if input:
        return f"{INTRO_WITH_INPUT}\n\n", f"\n{instruction}\n\n{INPUT_KEY}\n{input}\n\n"
    return f"{INTRO}\n\n", f"\n{instruction}\n\n"


# The words in capitals are filled in by `chat_template`, so that each prompt word has one home.
_CHAT_TEMPLATE = """
{%- for message in messages -%}
{%- set content = message['content'] PLAIN -%}
{%- if message['role'] == 'user' -%}
{{ INTRO_WITH_INPUT if INPUT_KEY in content else INTRO }}{{ content + '\\n\\n' }}
{%- elif message['role'] == 'assistant' -%}
{{ RESPONSE_KEY + content + END_KEY }}
{%- else -%}
{{ raise_exception('Dolly knows the roles user and assistant, not ' + message['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ RESPONSE_KEY }}{%- endif -%}
"""


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A Jinja template for `apply_chat_template` that renders Dolly's prompt, for one turn or more.

    What a template renders is tokenised at once, so a control token inside a message would become one:
    there, and only there, it gets a space more, as in "###  End".
    """
    plain = ""
    for token in tokenizer.all_special_tokens:
        spaced = re.sub(r"^(\W*)", r"\1 ", token)
        plain += f" | replace({json.dumps(token)}, {json.dumps(spaced)})"
    words = {
        "PLAIN": plain,
        "INTRO_WITH_INPUT": json.dumps(f"{INTRO_WITH_INPUT}\n\n{INSTRUCTION_KEY}\n"),
        "INTRO": json.dumps(f"{INTRO}\n\n{INSTRUCTION_KEY}\n"),
        "INPUT_KEY": json.dumps(f"\n\n{INPUT_KEY}\n"),
        "RESPONSE_KEY": json.dumps(RESPONSE_KEY),
        "END_KEY": json.dumps(f"\n\n{END_KEY}"),
    }
    template = re.sub("|".join(words), lambda match: words[match.group()], _CHAT_TEMPLATE.strip())
    return ("{{ bos_token }}" if _leading_ids(tokenizer) else "") + template


# --- prompts -> token ids ----------------------------------------------------------------------------


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts in which nothing is a control token, whatever it looks like.

    Straight to the Rust tokenizer: half of the time of `tokenizer(texts)` goes into offsets and masks that
    nobody reads here. `tokenizer(...)` sets these three again for itself at its next call.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str], inputs: Sequence[str | None]
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of (heads, bodies): a prompt is its head, its body, and the response key.

    The head is one of two fixed texts, so it is tokenised twice, not once a row.
    """
    key = tokenizer.convert_tokens_to_ids(INSTRUCTION_KEY)
    bos = _leading_ids(tokenizer)
    plain, with_input = (
        bos + ids + [key] for ids in encode_text(tokenizer, [f"{INTRO}\n\n", f"{INTRO_WITH_INPUT}\n\n"])
    )
    bodies = encode_text(
        tokenizer, [_prompt_pieces(a, b)[1] for a, b in zip(instructions, inputs, strict=True)]
    )
    return [with_input if given else plain for given in inputs], bodies


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: nothing for GPT-J, a BOS for Llama."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


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


# --- the prepared dataset ----------------------------------------------------------------------------


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
    _check_dropped(ledger, max_dropped_fraction)
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
    digest.update(repr((CACHE_FORMAT, _leading_ids(tokenizer), max_length, keep_truncated)).encode())
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
    ledger.length_histogram = _histogram(sizes)
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


def _histogram(sizes: np.ndarray) -> dict[str, int]:
    counts = np.bincount(np.searchsorted(HISTOGRAM_EDGES, sizes), minlength=len(HISTOGRAM_EDGES) + 1)
    names = [f"<={edge}" for edge in HISTOGRAM_EDGES] + [f">{HISTOGRAM_EDGES[-1]}"]
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def _check_dropped(ledger: Ledger, limit: float) -> None:
    dropped = sum(ledger.dropped.values())
    if ledger.rows_kept == 0 or dropped > limit * ledger.rows_read:
        raise DataError(
            f"{dropped:,} of {ledger.rows_read:,} rows would be dropped, more than "
            f"{limit:.0%} (--max-dropped-fraction {limit:g}).\n{ledger}\n"
            "Mend the rows, raise --max-length, or raise the limit with --max-dropped-fraction"
        )


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
