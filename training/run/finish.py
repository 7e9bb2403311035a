"""Finishes a run, once its model is written: verifies, describes and publishes it."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from training.data.ledger import Ledger
from training.errors import ModelError, PublishError, TrainingError, first_line
from training.evaluate.answers import Loading, compare_models, free_memory
from training.evaluate.report import as_table, read_evaluation, write_evaluation
from training.evaluate.rows import held_out_rows
from training.files import duration
from training.machine.cores import usable_cores
from training.model.tokenizer import load_tokenizer
from training.model.verify import verify_model
from training.options.reporting import trackers_of
from training.options.settings import Settings
from training.ranks import is_main_process
from training.run.model_card import loss_text, outcome, write_model_card
from training.storage import checkpoint
from training.storage.copy import publish
from training.storage.record import write_run_record
from training.tracking.mlflow_model import log_or_warn

logger = logging.getLogger(__name__)


def finish(
    settings: Settings,
    ledger: Ledger,
    record: dict[str, Any],
    last: Path,
    chosen: Path,
    weights: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Verifies, describes and publishes the model that `write_final_model` wrote. Returns the record of the run.

    Only rank 0 calls it. It depends on files only, so a later command can repeat it if this one is killed.

    Args:
        last: the checkpoint of the last step.
        chosen: the checkpoint from which the model was made; with --final-model best it may be an earlier one.
        weights: {name of a weight file: {"size": bytes, "sha256": hex}}.

    Raises TrainingError if the model is damaged or cannot be described, and PublishError.
    """
    options, output = settings.options, settings.output
    record |= outcome(record, chosen, last) | {"weights": weights}
    try:
        with _all_cores():
            verify_model(output, options.trust_remote_code)
        shutil.copyfile(last / "trainer_state.json", output / "trainer_state.json")
        write_model_card(output, record, ledger)
        write_run_record(output, record)
    except OSError as error:
        raise TrainingError(
            f"its last step: the model of {chosen} could not be placed in {output} ({error}). Make room, and type the "
            "same command with --resume auto"
        ) from error
    except ModelError as error:
        raise TrainingError(f"its last step, {checkpoint.step_of(last)}: {error}") from error
    logger.info(
        "held-out loss %.4f before, %.4f after; %s of training; the model is in %s",
        record["held_out_loss"]["before"],
        record["held_out_loss"]["after"],
        duration(record["seconds"]["training"]),
        output,
    )
    for label, losses in record["held_out_loss"].get("by_source", {}).items():
        logger.info("  of %s: %s before, %s after", label, *map(loss_text, losses.values()))
    _deliver(settings, record)
    return record


@contextmanager
def _all_cores() -> Iterator[None]:
    """Lets torch compute on every core, because the other ranks have ended. torchrun and Spark allow a rank one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, usable_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def deliver_again(settings: Settings, record: dict[str, Any]) -> dict[str, Any]:
    """Publishes and logs a run that an earlier command finished. Returns its record."""
    logger.info("%s is already finished", settings.output)
    if is_main_process():
        _deliver(settings, record)
    return record


def _deliver(settings: Settings, record: dict[str, Any]) -> None:
    """Evaluates, publishes and logs the finished model, in this order: the copies hold the evaluation.

    Raises PublishError after the model was logged all the same.
    """
    options, output = settings.options, settings.output
    if options.evaluate and "held_out" not in read_evaluation(output):
        _evaluate(settings, record)
    not_published = None
    try:
        if options.dbfs_output_dir:
            publish(output, options.dbfs_output_dir)
    except PublishError as error:  # its advice is to publish again, which would not log the model
        not_published = error
    if "mlflow" in trackers_of(options):
        log_or_warn(output, options.mlflow_model_name)
    if not_published is not None:
        raise not_published


def _evaluate(settings: Settings, record: dict[str, Any]) -> None:
    """Compares the model with its base on the held-out rows. If that fails, the model is complete without it."""
    options, output = settings.options, settings.output
    free_memory()  # of training
    try:
        with _all_cores():
            rows = held_out_rows(output, record, load_tokenizer(str(output), options.trust_remote_code))
            loading = Loading(trust_remote_code=options.trust_remote_code)
            sections = {"held_out": compare_models(rows, options.input_model, str(output), loading)}
        write_evaluation(output, sections)
    except Exception as error:  # too little memory, a full disk, rows or a base that are gone meanwhile
        reason = str(error) if isinstance(error, ValueError) else first_line(error)
        command = shlex.join(["python", "-m", "training.evaluate", "--model", str(output)])
        logger.warning(
            "The model in %s is complete, but was not evaluated: %s. Type %s", output, reason, command
        )
        return
    finally:
        free_memory()
    logger.info("%s", as_table(sections))
