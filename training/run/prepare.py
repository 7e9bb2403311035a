"""Prepares ranks, tokenizer and rows before the model is loaded, so that bad data is reported early."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import datasets
import torch
import transformers
from torch.distributed import distributed_c10d
from transformers import PreTrainedTokenizerBase, TrainingArguments

from training.data.batching import check_token_budget
from training.data.held_out import (
    asked_in_training,
    held_out_message,
    held_out_size,
    source_of_each,
    split_held_out,
)
from training.data.ledger import Ledger
from training.data.source_labels import source_labels
from training.data.tokens import marked_sample, prepare_sources
from training.errors import printable
from training.launch.supervisor import remove_shared_buffer
from training.model.adapter import check_adapter, check_base, lora_of
from training.model.loading import check_quantization, load_config, max_positions, rows_needed, text_config
from training.model.packing import Packing, packing_of
from training.model.tokenizer import load_tokenizer, saved_form
from training.model.trial import try_model
from training.options.checks import check_max_length
from training.options.deepspeed import for_engine
from training.options.settings import Settings
from training.options.trainer_options import MAX_STEPS, TrainingOptions
from training.options.wording import worded
from training.ranks import gather, is_main_process, on_rank_0, rank, together, world_size
from training.run.failures import default_sigterm
from training.run.identity import recorded_test_size
from training.run.operators import compile_operators

logger = logging.getLogger(__name__)

GPU_BACKENDS = "cpu:gloo,cuda:nccl"  # of the process group, by the device of the tensors


@dataclass(frozen=True)
class Prepared:
    """Tokenizer, rows and Trainer arguments of a run, the same on all ranks."""

    args: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    train_rows: datasets.Dataset
    held_out_rows: datasets.Dataset
    ledger: Ledger
    packing: Packing

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The sources for run.json: name, label, rows and held-out rows of each; [] for a single source."""
        held_out = Counter(source_of_each(self.held_out_rows))
        ledgers = self.ledger.sources
        labels = source_labels([ledger.source for ledger in ledgers])
        return [
            {"source": ledger.source, "label": label, "rows": ledger.rows_kept, "held_out": held_out[number]}
            for number, (ledger, label) in enumerate(zip(ledgers, labels, strict=True))
        ]


def prepare(settings: Settings) -> tuple[Settings, Prepared]:
    """Forms the process group, tokenises the rows once for all ranks, and chooses those that are held out.

    Returns the settings with the number of held-out rows. Raises OptionsError, DataError or ModelError.
    """
    options = settings.options
    _quiet_libraries()
    args = form_process_group(settings)
    recorded = on_rank_0(lambda: recorded_test_size(options))
    tokenizer = together(lambda: _on_rank_0_first(args, lambda: run_tokenizer(options)))
    packing = agreed_packing(options, tokenizer)
    if options.quantize:
        check_quantization(options.quantize, args.device)

    def split_rows() -> tuple[Ledger, int, int, datasets.Dataset, datasets.Dataset]:
        _, rows, ledger = tokenised_rows(options, tokenizer, packing)
        test_size = held_out_size(options.test_size, len(rows), recorded)
        return ledger, len(rows), test_size, *split_held_out(rows, test_size, options.seed)

    ledger, count, test_size, train_rows, held_out_rows = together(lambda: _on_rank_0_first(args, split_rows))
    if isinstance(options.max_tokens_per_device, int):
        check_token_budget(train_rows["length"][:], options.max_tokens_per_device)
    logger.info("%s", ledger)
    logger.info("%s", worded(held_out_message(test_size, count, options.test_size, recorded)))
    prepared = Prepared(args, tokenizer, train_rows, held_out_rows, ledger, packing)
    _log_rows(prepared)
    return settings.with_test_size(test_size), prepared


def _log_rows(prepared: Prepared) -> None:
    """Logs the held-out rows of each source, and a row of each as the model sees it."""
    train_rows, ledger = prepared.train_rows, prepared.ledger
    for source in prepared.sources:
        logger.info("  %s of %s", f"{source['held_out']:,}", printable(source["source"]))
    if is_main_process() and (repeated := asked_in_training(train_rows, prepared.held_out_rows)):
        logger.info(
            "%s held-out %s the same as a training row, so the held-out loss is lower than on questions that are new",
            f"{repeated:,}",
            "row asks" if repeated == 1 else "rows ask",
        )
    numbers = source_of_each(train_rows)
    for number in dict.fromkeys(numbers):
        row = train_rows[numbers.index(number)]
        sample = marked_sample(prepared.tokenizer, row["input_ids"], row["response_spans"])
        of_source = f" of {printable(ledger.sources[number].source)}" if ledger.sources else ""
        logger.info(
            "a row%s as the model sees it; the loss is on the tokens between « and »:\n%s", of_source, sample
        )


def _on_rank_0_first(args: TrainingArguments, function: Callable[[], Any]) -> Any:
    """Runs `function` on every rank; rank 0 fills the caches that the others read."""
    with args.main_process_first():
        return function()


def agreed_packing(options: TrainingOptions, tokenizer: PreTrainedTokenizerBase) -> Packing:
    """What the model's architecture supports on all ranks. If one rank has an obstacle, no rank packs.

    Raises OptionsError if the model could not be trained, saved or reloaded.
    """
    name, trust_remote_code = options.input_model, options.trust_remote_code
    config = together(lambda: load_config(name, trust_remote_code))  # or one rank is missing in the gather
    packing = Packing("padded rows were requested")
    if options.batching == "packed":
        answers = gather(packing_of(config, trust_remote_code))
        obstacle = next((answer.obstacle for answer in answers if answer.obstacle), None)
        packing = Packing(obstacle, all(answer.response_loss for answer in answers))
    lora = lora_of(options) if options.lora else None
    if lora is not None:
        check_base(name)
        together(lambda: check_adapter(config, lora, trust_remote_code))
    grows = rows_needed(tokenizer) > (text_config(config).vocab_size or 0)
    return on_rank_0(lambda: try_model(name, config, packing, grows, trust_remote_code, lora))


def form_process_group(settings: Settings) -> TrainingArguments:
    """Compiles DeepSpeed's operators, forms the process group, and returns the Trainer's arguments."""
    timeout = settings.options.rank_timeout
    if settings.deepspeed is not None:
        compile_operators(settings.deepspeed, timeout)
        _leave_out_profiler_marks()
    with default_sigterm():
        if settings.deepspeed is not None:
            connect_ranks(timedelta(seconds=timeout))
        return training_arguments(settings)


def connect_ranks(timeout: timedelta) -> None:
    """Forms the process group before transformers would. Objects go over gloo also on GPUs.

    gloo notices at once that another rank has ended; NCCL waits until `timeout`.
    """
    import deepspeed

    # DeepSpeed forms more groups, without a timeout; these are torch's defaults for them.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    on_gpu = torch.cuda.is_available()
    backend = GPU_BACKENDS if on_gpu else "gloo"
    if store := _store_of_restart(timeout):
        torch.distributed.init_process_group(
            backend, store=store, rank=rank(), world_size=world_size(), timeout=timeout
        )
    with redirect_stdout(io.StringIO()):  # each rank would print the loaded operators
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)
    if not on_gpu:
        torch.distributed.barrier()  # now every rank has opened the shared buffers by name
        remove_shared_buffer()  # now, because a killed run could not


def _store_of_restart(timeout: timedelta) -> torch.distributed.Store | None:
    """The store for a start by torchrun's --max-restarts; None for a first start.

    torchrun keeps one store for all of them, in which the ranks would find the addresses of those that have ended.
    """
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not restart or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, is_master=False, timeout=timeout)
    return torch.distributed.PrefixStore(f"restart {restart}", store)


def _leave_out_profiler_marks() -> None:
    """DeepSpeed marks its functions for NVIDIA's profiler, thousands of times a step, also if no profiler runs."""
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False


def training_arguments(settings: Settings) -> TrainingArguments:
    """The Trainer's arguments. Under ZeRO-3 they must stay alive while `from_pretrained` loads in shards."""
    options = settings.options
    gpu = torch.cuda.is_available() or (settings.ranks == 1 and torch.backends.mps.is_available())
    return TrainingArguments(
        output_dir=str(settings.output),
        seed=options.seed,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        learning_rate=options.lr,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        per_device_train_batch_size=options.per_device_train_batch_size,
        per_device_eval_batch_size=options.per_device_eval_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        deepspeed=None if settings.deepspeed is None else for_engine(settings.deepspeed),
        use_cpu=not gpu,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,  # the default hides a NaN loss in the log
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        eval_on_start=True,
        save_steps=options.save_steps or MAX_STEPS,  # until a time is turned into steps
        ddp_timeout=options.rank_timeout,
        log_on_each_node=False,
        log_level="error",
        log_level_replica="error",
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        # A batch is copied while the GPU computes.
        accelerator_config={"non_blocking": torch.cuda.is_available()},
    )


def run_tokenizer(options: TrainingOptions) -> PreTrainedTokenizerBase:
    """The base model's tokenizer with the control tokens, as stock transformers will load it from the saved folder."""
    config = load_config(options.input_model, options.trust_remote_code)
    tokenizer = load_tokenizer(options.input_model, options.trust_remote_code)
    return saved_form(tokenizer, config, options.trust_remote_code)


def tokenised_rows(
    options: TrainingOptions,
    tokenizer: PreTrainedTokenizerBase | None = None,
    packing: Packing = Packing(),  # noqa: B008  (frozen)
) -> tuple[PreTrainedTokenizerBase, datasets.Dataset, Ledger]:
    """(tokenizer, rows, ledger) of a run; model and --max-length limit the rows (see `prepare_sources`).

    Raises OptionsError if --max-length is more than the model's rows can have.
    """
    config = load_config(options.input_model, options.trust_remote_code)
    positions = packing.row_limit(max_positions(config))
    check_max_length(options, positions)
    tokenizer = tokenizer or run_tokenizer(options)
    rows, ledger = prepare_sources(
        options.training_dataset,
        tokenizer,
        options.max_length or positions,
        options.keep_truncated,
        options.max_dropped_fraction,
        selection=options.dataset_selection,
        positions=positions,
        drop_unusable=options.drop_unusable,
    )
    return tokenizer, rows, ledger


def _quiet_libraries() -> None:
    """Turns off the progress bars and notices of libraries; warnings about problems remain."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # accelerate warns that DeepSpeed accumulates gradients, which is intended.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
