"""Scores models on rows: the loss of each response, and the greedy answers, in batches of similar length.

In a conversation the last response is scored, after the turns before it."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.consts import GREEDY, MAX_NEW_TOKENS
from training.data.collator import DataCollatorForCompletionOnlyLM
from training.data.encoding import surrounding_ids
from training.data.ledger import Ledger
from training.data.prompt import END_KEY
from training.data.tokens import Span, encode_rows
from training.errors import DataError, ModelError
from training.evaluate.compare import compare_groups, compare_scores
from training.evaluate.metrics import Scores, exact_matches, rouge_l
from training.files import duration
from training.model.generation import answer_ids, load_model_tokenizer_for_generate
from training.model.loading import load_config, max_positions
from training.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from training.evaluate.rows import Rows

logger = logging.getLogger(__name__)

BATCH_SIZE = 32  # rows that are answered at once
# Tokens whose loss is computed at once: their logits take 0.4 GB in float32 with GPT-J's vocabulary.
LOSS_TOKENS = 2048
SECONDS_BETWEEN_LINES = 15.0


@dataclass(frozen=True)
class Loading:
    """How a model is loaded and asked.

    Attributes:
        dtype: of the weights; None for half precision on a GPU and float32 on a CPU.
        batch_size: rows that are answered at once; halved where the GPU's memory does not suffice.
        max_new_tokens: longest answer, in tokens.
        trust_remote_code: run Python code of the models' repositories.
    """

    dtype: torch.dtype | None = None
    batch_size: int = BATCH_SIZE
    max_new_tokens: int = MAX_NEW_TOKENS
    trust_remote_code: bool = False


def compare_models(rows: Rows, base: str, tuned: str, loading: Loading) -> dict[str, Any]:
    """Scores base and tuned model on the rows, one after the other. Returns a section of evaluation.json.

    Raises ModelError or DataError before a weight is loaded, if a model or its tokenizer cannot be used, or if no row
    fits into both.
    """
    names = (base, tuned)
    limits = [max_positions(load_config(name, loading.trust_remote_code)) for name in names]
    tokenizers = [load_tokenizer(name, loading.trust_remote_code) for name in names]
    same = same_tokens(*tokenizers)
    rows, encoded = encode_for(rows, list(zip(tokenizers, limits, strict=True)))
    scores, dtypes = [], []
    for name, encoded_rows in zip(names, encoded, strict=True):
        model, tokenizer = load_model_tokenizer_for_generate(
            name, loading.dtype, trust_remote_code=loading.trust_remote_code
        )
        dtypes.append(str(model.dtype).removeprefix("torch."))
        scores.append(score(name, model, tokenizer, encoded_rows, rows.columns.output, loading))
        del model
        free_memory()
    categories, sources = rows.columns.category, rows.sources
    return {
        "base": base,
        "tuned": tuned,
        "rows": {
            "source": rows.source,
            "count": len(rows),
            "of": rows.of,
            "chosen": rows.chosen,
            "left_out": dict(rows.dropped or {}),
            "conversations": sum(map(bool, rows.columns.history)),
            "shortened": rows.shortened,
        },
        "settings": {
            "decoding": "greedy",
            "max_new_tokens": loading.max_new_tokens,
            "dtype": dict(zip(("base", "tuned"), dtypes, strict=True)),
            "same_tokens": same,
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "rouge-score")},
        "metrics": compare_scores(scores[0], scores[1], same),
        "sources": compare_groups(scores[0], scores[1], sources, same) if len(set(sources)) > 1 else {},
        "categories": compare_groups(scores[0], scores[1], categories, same) if categories else {},
    }


@dataclass(frozen=True)
class EncodedRows:
    """Rows as a model sees them: `ids[row][starts[row]:]` is the response that is scored, with its end key."""

    ids: list[list[int]]
    starts: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prompts(self) -> list[list[int]]:
        return [ids[:start] for ids, start in zip(self.ids, self.starts, strict=True)]


def encode_for(
    rows: Rows, tokenizers: Sequence[tuple[PreTrainedTokenizerBase, int]]
) -> tuple[Rows, list[EncodedRows]]:
    """The rows that all models can take, as each tokenizer encodes them.

    Training drops the last turns of a conversation that is too long. Here they are dropped as well, and of all models the
    one that can take the fewest turns decides: all are scored on the same answer.

    Args:
        tokenizers: of each model, with the most tokens that a row may have.

    Raises DataError if no row is short enough for all of them.
    """
    by_model: list[dict[int, tuple[list[int], list[Span]]]] = []
    for tokenizer, limit in tokenizers:
        ledger = Ledger(rows.source, min(limit, rows.max_length or limit))
        encoded = encode_rows(tokenizer, rows.columns, ledger, rows.keep_truncated)
        by_model.append({number - 1: (ids, spans) for number, ids, spans in encoded})
    places = sorted(set.intersection(*(set(encoded) for encoded in by_model)))
    if not places:
        limit = min(limit for _, limit in tokenizers)
        raise DataError(
            f"{rows.source}: every row is longer than the {limit:,} tokens that the models can take"
        )
    dropped = dict(rows.dropped or {})
    if len(places) < len(rows):
        dropped["longer than a model can take"] = len(rows) - len(places)
    turns = [min(len(encoded[place][1]) for encoded in by_model) for place in places]
    chosen = []
    for of_model in by_model:
        scored = [
            (of_model[place][0], of_model[place][1][count - 1])
            for place, count in zip(places, turns, strict=True)
        ]
        chosen.append(
            EncodedRows([ids[:end] for ids, (_, end) in scored], [start for _, (start, _) in scored])
        )
    return replace(rows.at(places).first_turns(turns), dropped=dropped or None), chosen


def same_tokens(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same tokens: losses a token can be compared only then."""
    return first.get_vocab() == second.get_vocab() and surrounding_ids(first) == surrounding_ids(second)


def score(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: EncodedRows,
    expected: Sequence[str],
    loading: Loading,
) -> Scores:
    """The scores of a loaded model. Raises ModelError if its loss is not a finite number."""
    losses = response_losses(model, tokenizer, rows, _progress(name, "losses", len(rows)))
    if not np.isfinite(losses).all():
        advice = "Its weights are damaged" if model.dtype == torch.float32 else "Type --dtype fp32"
        raise ModelError(
            f"{name}: its loss is NaN or infinite in {str(model.dtype).removeprefix('torch.')}. {advice}"
        )
    answers = greedy_answers(
        model,
        tokenizer,
        rows.prompts,
        loading.max_new_tokens,
        loading.batch_size,
        _progress(name, "answers", len(rows)),
    )
    return Scores(
        losses=losses,
        tokens=np.array(
            [len(ids) - max(1, start) for ids, start in zip(rows.ids, rows.starts, strict=True)], float
        ),
        exact=exact_matches(expected, answers.texts),
        rouge=rouge_l(expected, answers.texts),
        stopped=np.array(answers.stopped, float),
        lengths=np.array(answers.lengths, float),
        answers=answers.texts,
    )


def free_memory() -> None:
    """Returns the memory of a model that is no longer used, so that the next one has room on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.inference_mode()
def response_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: EncodedRows,
    progress: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """The sum of the losses of each row's response tokens with its end key, in nats: `(rows,)` float64.

    The labels are those of training. Rows are padded on the right, where no token can see the padding.
    """
    collate = DataCollatorForCompletionOnlyLM(tokenizer.pad_token_id)
    sums = np.zeros(len(rows))

    def score_batch(places: Sequence[int]) -> None:
        batch = collate(
            [
                {"input_ids": rows.ids[i], "response_spans": [[rows.starts[i], len(rows.ids[i])]]}
                for i in places
            ]
        )
        # The collator pads to a multiple of 8, which may be more than the model's positions.
        longest = max(len(rows.ids[i]) for i in places)
        ids, mask, labels = (
            batch[name][:, :longest].to(model.device) for name in ("input_ids", "attention_mask", "labels")
        )
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for place, row_logits, targets in zip(places, logits, labels, strict=True):
            start, end = max(1, rows.starts[place]), len(rows.ids[place])
            losses = F.cross_entropy(
                row_logits[start - 1 : end - 1].float(), targets[start:end], reduction="none"
            )
            sums[place] = losses.cpu().double().sum().item()

    most = max(1, LOSS_TOKENS // max(map(len, rows.ids)))
    _in_batches([len(ids) for ids in rows.ids], most, score_batch, progress)
    return sums


@dataclass(frozen=True)
class Answers:
    """Greedy answers of rows, in order: texts, whether each ended by itself, and lengths without the ending token."""

    texts: list[str]
    stopped: list[bool]
    lengths: list[int]


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int], None] = lambda count: None,
) -> Answers:
    """The greedy answers to prompts given as token ids.

    An answer ends by itself with the end key or EOS. Otherwise it is cut at `max_new_tokens`, or where the model has no
    more positions: a prompt is never cut, so an answer to a long prompt may be shorter.
    """
    ends = torch.tensor([tokenizer.convert_tokens_to_ids(END_KEY), tokenizer.eos_token_id])
    positions = max_positions(model.config)
    texts, stopped, lengths = [""] * len(prompts), [False] * len(prompts), [0] * len(prompts)

    def answer(places: Sequence[int]) -> None:
        room = positions - max(len(prompts[i]) for i in places)
        if room < max_new_tokens and len(places) > 1:  # the room of a row does not depend on its batch
            for place in places:
                answer([place])
            return
        batch = [prompts[i] for i in places]
        limit = max(1, min(max_new_tokens, room))
        new = answer_ids(batch, model, tokenizer, model.device, max_new_tokens=limit, **GREEDY).cpu()
        is_end = torch.isin(new, ends)
        for place, ids, end in zip(places, new, is_end, strict=True):
            stopped[place] = bool(end.any())
            lengths[place] = int(end.int().argmax()) if stopped[place] else len(ids)
            texts[place] = tokenizer.decode(ids[: lengths[place]], skip_special_tokens=True).strip()

    _in_batches(list(map(len, prompts)), batch_size, answer, progress)
    return Answers(texts, stopped, lengths)


def _in_batches(
    lengths: Sequence[int],
    rows: int,
    function: Callable[[Sequence[int]], None],
    progress: Callable[[int], None],
) -> None:
    """Calls `function` with the places of at most `rows` rows of similar length, the longest first.

    Halves the number of rows where the GPU's memory does not suffice. Raises torch.OutOfMemoryError for one row.
    """
    left = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    done = 0
    while left:
        batch = left[:rows]
        try:
            function(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            rows = len(batch) // 2
            logger.warning(
                "the GPU's memory does not suffice for %d rows at once; going on with %d", 2 * rows, rows
            )
            free_memory()
            continue
        left = left[rows:]
        done += len(batch)
        progress(done)


def _progress(name: str, what: str, count: int) -> Callable[[int], None]:
    """A function that logs how many rows are done, every few seconds and at the end."""
    begin = last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == count or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            logger.info(
                "%s: %s of %s of %s rows, %s", name, what, f"{done:,}", f"{count:,}", duration(now - begin)
            )

    return report
