"""Names of other trainers' options, with ours: transformers' TrainingArguments, TRL's, Alpaca's, axolotl's, LLaMA-Factory's.

An unknown option is answered with what to type instead.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches

# Ours -> theirs. Dashes and underscores are the same.
SAME = {
    "--input-model": "model-name-or-path model model-name model-id model-path base-model pretrained-model-name-or-path "
    "pretrained-model tokenizer-name tokenizer",
    "--training-dataset": "dataset dataset-name dataset-name-or-path dataset-path dataset-dir data data-path data-file "
    "data-files train-file train-data train-dataset train-data-path training-file datasets",
    "--max-length": "max-seq-length max-seq-len model-max-length cutoff-len block-size sequence-len seq-length "
    "max-source-length max-sequence-length context-length max-len",
    "--test-size": "val-size val-set-size validation-split-percentage validation-size eval-size test-split held-out "
    "max-eval-samples",
    "--seed": "data-seed random-seed",
    "--epochs": "num-train-epochs num-epochs epoch n-epochs train-epochs max-epochs",
    "--max-steps": "max-train-steps num-train-steps train-steps num-steps max-iters total-steps",
    "--lr": "learning-rate lr-rate base-lr",
    "--lr-scheduler-type": "lr-scheduler scheduler lr-schedule lr-decay-style",
    "--warmup-steps": "num-warmup-steps lr-warmup-steps lr-warmup-iters warmup-iters",
    "--weight-decay": "wd",
    "--lora": "lora-r lora-rank adapter-rank r",
    "--lora-targets": "lora-target lora-target-modules target-modules lora-modules",
    "--quantize": "quantization quantization-type bnb-4bit-quant-type",
    "--per-device-train-batch-size": "per-device-batch-size batch-size train-batch-size micro-batch-size "
    "train-micro-batch-size-per-gpu per-gpu-train-batch-size micro-train-batch-size",
    "--per-device-eval-batch-size": "eval-batch-size per-gpu-eval-batch-size",
    "--gradient-accumulation-steps": "gradient-accumulation grad-accum grad-accumulation-steps accumulation-steps "
    "accumulate-grad-batches",
    "--gradient-checkpointing": "activation-checkpointing use-gradient-checkpointing",
    "--bf16": "bfloat16 use-bf16",
    "--fp16": "float16 use-fp16 half",
    "--deepspeed": "ds-config deepspeed-config-file deepspeed-config-path",
    "--rank-timeout": "ddp-timeout",
    "--local-output-dir": "output-dir output out out-dir save-dir save-path output-path output-folder output-directory",
    "--dbfs-output-dir": "publish-dir hub-model-id",
    "--checkpoint-to": "remote-checkpoint-dir checkpoint-dir save-to remote-save-folder checkpoint-uri",
    "--logging-steps": "log-interval log-steps log-every",
    "--eval-steps": "evaluation-steps eval-interval eval-every",
    "--save-steps": "save-interval checkpoint-steps checkpointing-steps",
    "--save-every": "save-interval-time save-minutes checkpoint-every",
    "--save-total-limit": "keep-checkpoints max-checkpoints",
    "--resume": "resume-from-checkpoint resume-from checkpoint",
    "--force": "yes ignore-plan",
    "--mlflow-model-name": "registered-model-name",
    "--max-tokens-per-device": "max-tokens",
}  # fmt: skip
FOLDER = "The output folder has the figures of a run in metrics.jsonl, and in runs/ for TensorBoard"
# What to do, where no option of ours has the same values -> theirs.
OTHERWISE = {
    "Type --warmup-steps with a number of steps": "warmup-ratio warmup",
    "Type --no-bf16 --no-fp16 for float32, --bf16 or --fp16": "torch-dtype dtype mixed-precision precision fp32 bf16-full-eval "
    "fp16-full-eval half-precision-backend",
    "Type --batching packed or --batching padded": "packing sample-packing group-by-length pad-to-max-length "
    "length-column-name train-sampling-strategy padding-free",
    "Type --final-model best": "load-best-model-at-end metric-for-best-model greater-is-better",
    "Type --eval-steps N": "eval-strategy evaluation-strategy eval-on-start eval-delay do-eval",
    "Type --save-steps N or --save-every TIME": "save-strategy",
    "Type --logging-steps N": "logging-strategy logging-first-step",
    "Type --report-to with tensorboard, mlflow, wandb or trackio": "use-wandb tensorboard wandb trackio use-tensorboard",
    "Type --report-to tensorboard,mlflow": "mlflow",
    "Type --report-to wandb or trackio, and export WANDB_PROJECT=NAME or TRACKIO_PROJECT=NAME": "wandb-project project",
    f"{FOLDER}. --report-to names other trackers": "logging-dir run-name",
    "Leave it out: the optimizer is AdamW with betas 0.9 and 0.999 and eps 1e-8": "optim optimizer optim-args adam-beta1 "
    "adam-beta2 adam-epsilon optim-target-modules",
    "Leave it out: gradients are clipped at a norm of 1.0": "max-grad-norm gradient-clipping clip-grad grad-clip",
    "Type --lora 16 to train adapters, or leave it out to train every weight": "use-peft use-lora finetuning-type adapter",
    "Type --lora 16 --quantize nf4 to train adapters on a base model in 4 bits": "load-in-4bit load-in-8bit quantization-bit "
    "use-qlora qlora use-bnb-nested-quant",
    "Type --deepspeed config/ds_z3_bf16_config.json": "fsdp fsdp-config fsdp-transformer-layer-cls-to-wrap",
    "Type deepspeed --num_gpus N --module training.trainer ...": "num-gpus num-processes nproc-per-node n-gpu",
    "Leave it out: a run writes into a new folder only. --resume auto continues one": "overwrite-output-dir",
    "Leave it out: the trainer always trains": "do-train do-predict stage",
    "Leave it out: the loss is on the response only": "train-on-inputs completion-only-loss assistant-only-loss train-on-prompt",
    "Leave it out: the prompt is Alpaca's, in training/data/prompt.py": "template prompt-template chat-template prompt-template-name",
    "Type --dbfs-output-dir with a folder or a URL": "push-to-hub hub-token hub-strategy",
}  # fmt: skip


def _plain(name: str) -> str:
    """A name without dashes, underscores and dots."""
    return re.sub("[-_.]", "", name.lower())


_SAME = {_plain(name): ours for ours, names in SAME.items() for name in names.split()}
_OTHERWISE = {_plain(name): advice for advice, names in OTHERWISE.items() for name in names.split()}


def advice_for(flag: str, known: Collection[str]) -> str:
    """What to type instead of the unknown option `flag` in a command that has the options `known`."""
    name = _plain(flag)
    ours = {_plain(option): option for option in known}.get(name) or _SAME.get(name)
    if ours in known:
        return f"Type {ours}"
    if name in _OTHERWISE and "--lr" in known:  # the trainer
        return _OTHERWISE[name]
    bare = {option.lstrip("-"): option for option in sorted(known)}  # the dashes would make all of them alike
    close = [bare[match] for match in get_close_matches(flag.lstrip("-").replace("_", "-"), bare, n=2)]
    return f"Did you mean {' or '.join(close)}" if close else "--help lists the options"
