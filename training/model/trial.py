"""Trains, saves and reloads a small copy of a model before its weights are loaded.

What a run asks of a model until its end is asked here first, so that no run trains and then fails. The reason of a
refusal is one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from training.consts import IGNORE_INDEX
from training.data.collator import DataCollatorForCompletionOnlyLM, DataCollatorForPackedRows
from training.data.prompt import CONTROL_TOKENS
from training.errors import ModelError, first_line
from training.model.adapter import Lora, add_adapter, merge
from training.model.blocks import blocks_are_units
from training.model.loss import use_padded_loss
from training.model.new_rows import trainable_state
from training.model.twin import (
    HEADS,
    POSITIONS,
    VOCABULARY,
    meta_model,
    shrunken_twin,
    small_random_rows,
    without_zero3,
)
from training.model.verify import answer_problems, load_stock, save_model, weight_problems

if TYPE_CHECKING:
    from training.model.packing import Packing

# A table of positions may begin after the padding's id, and then the config's maximum is larger than the longest row.
MOST_LOST_POSITIONS = 8

# Largest difference that counts as rounding in float32, relative to the largest logit or the loss. A wrong mask or a
# lost weight changes a tenth.
TOLERANCE = 1e-3


def try_model(
    name: str,
    config: PreTrainedConfig,
    packing: Packing,
    grows: bool,
    trust_remote_code: bool = False,
    lora: Lora | None = None,
) -> Packing:
    """`packing`, the result of `packing_of`, completed. Raises ModelError if the model could not be trained to its end.

    `grows` says whether the embedding grows by the control tokens, `lora` which adapter is trained. Only rank 0 calls it.
    """
    with without_zero3(), torch.random.fork_rng(devices=[]):
        try:
            twin = _running_twin(config, trust_remote_code)
            return packing if twin is None else _try_twin(twin, packing, grows, trust_remote_code, lora)
        except _RefusedError as refusal:
            raise ModelError(
                f"{name}: a {config.model_type} model cannot be trained here: {refusal}. Name another base model"
            ) from refusal


def _running_twin(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel | None:
    """A small copy that computes a short row. None if shrinking does not suit the architecture.

    Raises _RefusedError if the model cannot be built, or computes no row in any size.
    """
    failures = []
    for heads in (HEADS, 2 * HEADS):
        with suppress(Exception):  # whatever an architecture's code raises
            # The fused experts of stock transformers have no float64, and some code makes float32 tensors of its own.
            twin = shrunken_twin(config, heads, trust_remote_code).float()
            try:
                with torch.no_grad():
                    twin(input_ids=small_random_rows([5])[0])
            except Exception as error:
                failures.append(error)
                continue
            return twin
    with _because("no model can be built from its config.json"):
        meta_model(config, trust_remote_code)
    if len(failures) == 2 and not trust_remote_code:
        raise _RefusedError(f"its code fails on a short row ({first_line(failures[0])})")
    return None


# --- what is asked of the small copy ------------------------------------------------------------------


class _RefusedError(Exception):
    """Why a small copy cannot be trained, as the part of a sentence."""


@contextmanager
def _because(reason: str) -> Iterator[None]:
    """Turns whatever an architecture's code raises into the reason of a refusal."""
    try:
        yield
    except _RefusedError:
        raise
    except Exception as error:
        raise _RefusedError(f"{reason} ({first_line(error)})") from error


def _try_twin(
    twin: PreTrainedModel, packing: Packing, grows: bool, trust_remote_code: bool, lora: Lora | None
) -> Packing:
    tokens = VOCABULARY
    if grows:
        with _because("its embedding cannot grow by the control tokens"):
            tokens += len(CONTROL_TOKENS)
            twin.resize_token_embeddings(tokens, mean_resizing=False)
    with _because("its code fails on a row with the new tokens"):
        _check_that_later_tokens_do_not_matter(twin, tokens)
    packing = replace(packing, lost_positions=_lost_positions(twin, tokens))
    with _because("its code fails on padded rows"):
        rows = small_random_rows([packing.row_limit(POSITIONS), 5, 9], tokens)
        _check_padding(twin, rows)
    if packing.obstacle is None:
        packing.prepare(twin)
    else:
        packing = replace(packing, padded_loss=not _trains(twin, rows))
        if packing.padded_loss:
            use_padded_loss(twin)
            with _because("its gradients cannot be computed"):
                if not _trains(twin, rows):
                    raise _RefusedError("its loss is not that of the next tokens")
    batch = _collated(
        rows, DataCollatorForPackedRows if packing.obstacle is None else DataCollatorForCompletionOnlyLM
    )
    packing = replace(packing, whole_blocks=blocks_are_units(twin, batch))
    with TemporaryDirectory() as folder:
        _check_saved(twin, rows[0][:, :8], Path(folder), trust_remote_code)
    if lora is not None:
        with _because("its code fails with adapters"):
            _check_adapter(twin, rows[0][:, :8], lora)
    return packing


@torch.no_grad()
def _check_adapter(twin: PreTrainedModel, prompt: torch.Tensor, lora: Lora) -> None:
    """Raises _RefusedError if code goes past an adapter: merged into the weights, it gives other logits."""
    last = int(prompt[0, -1])
    small = replace(lora, rank=min(lora.rank, HEADS), dropout=0.0)
    add_adapter(twin, small, [last - 1, last], seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable_state(twin).values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    logits = twin(input_ids=prompt).logits
    merge(twin)
    difference = _difference(logits, twin(input_ids=prompt).logits)
    if not difference <= TOLERANCE:
        raise _RefusedError(
            f"its code goes past adapters: merged into the weights they change its logits by {difference:.1g} of the "
            "largest one. Type --lora-targets with other layers, or leave out --lora"
        )


def _difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference of two tensors of logits, relative to the largest one; NaN if they are not finite."""
    return float((first - second).abs().max() / second.abs().max())


@torch.no_grad()
def _check_that_later_tokens_do_not_matter(twin: PreTrainedModel, tokens: int) -> None:
    """An encoder is loaded as a causal language model without a word, and would learn to copy the next token."""
    row = small_random_rows([24], tokens)[0]
    other = row.clone()
    other[:, 12:] = row[:, 12:].flip(1)
    logits = twin(input_ids=row).logits
    if not torch.isfinite(logits).all():
        raise _RefusedError("its logits are not finite, even with small random weights")
    difference = _difference(twin(input_ids=other).logits[:, :12], logits[:, :12])
    if not difference <= TOLERANCE:
        cure = ""
        if getattr(twin.config, "is_decoder", None) is False:
            cure = ', as in an encoder; if it was trained as a decoder, set "is_decoder": true in its config.json'
        raise _RefusedError(f"its tokens see later ones{cure}")


@torch.no_grad()
def _lost_positions(twin: PreTrainedModel, tokens: int) -> int:
    """Number of the config's positions that no row can use."""
    with _because("its code fails on a row as long as its positions"):
        for lost in range(MOST_LOST_POSITIONS + 1):
            # Without the padding's token, which has no position in RoBERTa.
            row = torch.full((1, POSITIONS - lost), tokens - 2)
            try:
                twin(input_ids=row, attention_mask=torch.ones_like(row))
            except Exception:  # an index beyond a table of positions, or a mask that is too small
                if lost == MOST_LOST_POSITIONS:
                    raise
                continue
            break
    return lost


@torch.no_grad()
def _check_padding(twin: PreTrainedModel, rows: list[torch.Tensor]) -> None:
    """Raises _RefusedError if a padded row has other logits than the row alone."""
    batch = _padded(rows)
    logits = twin(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for number, row in enumerate(rows):
        difference = _difference(logits[number : number + 1, : row.shape[1]], twin(input_ids=row).logits)
        if not difference <= TOLERANCE:
            raise _RefusedError(f"padding changes its logits by {difference:.1g} of the largest one")


def _padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return _collated(rows, DataCollatorForCompletionOnlyLM)


def _collated(rows: list[torch.Tensor], collator: Any) -> dict[str, torch.Tensor]:
    return collator(pad_token_id=0)(
        [
            {"input_ids": row[0].tolist(), "response_spans": [[row.shape[1] // 2, row.shape[1]]]}
            for row in rows
        ]
    )


def _trains(twin: PreTrainedModel, rows: list[torch.Tensor]) -> bool:
    """Whether the loss of padded rows is that of their next tokens, and has finite gradients."""
    batch = _padded(rows)
    targets = batch["labels"][:, 1:]
    items = int((targets != IGNORE_INDEX).sum()) + 3  # the Trainer counts those of other ranks, too
    with torch.no_grad():
        logits = twin(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / items
    try:
        loss = twin(**batch, num_items_in_batch=torch.tensor(items)).loss
        loss.backward()
    except Exception:
        if getattr(twin, "accepts_loss_kwargs", False):  # the loss is ours already
            raise
        return False
    finally:
        gradients = [parameter.grad for parameter in twin.parameters() if parameter.grad is not None]
        twin.zero_grad(set_to_none=True)
    finite = bool(gradients) and all(torch.isfinite(gradient).all() for gradient in gradients)
    return finite and bool(abs(loss.detach() - expected) <= TOLERANCE * expected)


def _check_saved(twin: PreTrainedModel, prompt: torch.Tensor, folder: Path, trust_remote_code: bool) -> None:
    """Saves the copy as a run does, and verifies the folder as a run does. Raises _RefusedError."""
    with _because("it cannot be saved"):
        save_model(twin, twin.state_dict(), GenerationConfig(eos_token_id=1, pad_token_id=1), folder, "5GB")
    with _because("what is saved does not work in stock transformers"):
        problems = weight_problems(folder, trust_remote_code)
        again, of_loading = load_stock(folder, trust_remote_code)
        problems += of_loading
        if not problems:
            with torch.no_grad():
                difference = _difference(again(input_ids=prompt).logits, twin(input_ids=prompt).logits)
            if not difference <= TOLERANCE:
                problems = [f"its logits differ by {difference:.1g} of the largest one"]
    if problems:
        raise _RefusedError(f"stock transformers loads another model than was saved ({problems[0]})")
    with _because("generate() of stock transformers fails on it"):
        problems = answer_problems(again, prompt)
    if problems:
        raise _RefusedError(problems[0])
