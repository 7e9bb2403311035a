"""Defaults, file names and constants shared by several packages. Imports none of our modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

IGNORE_INDEX = -100  # torch's cross entropy skips targets of this value
DEFAULT_INPUT_MODEL = "EleutherAI/gpt-j-6B"
DEFAULT_TRAINING_DATASET = "tatsu-lab/alpaca"
DEFAULT_SEED = 42
DEFAULT_TEST_SIZE = 1000  # rows held out
# Defaults by method. Adapters start at zero and take larger steps.
LEARNING_RATES = {"full": 1e-5, "lora": 2e-4}
SAMPLE_TOKENS = 128  # longest sample answer during training, in tokens
WEIGHTS = ".safetensors"  # suffix of weight files
ADAPTER_FOLDER = "adapter"  # in the folder of a finished LoRA run: the adapter as peft loads it
LORA_FILE = "lora.json"  # in a checkpoint of a LoRA run: what makes a model of it
RUN_FILE = "run.json"  # the record of a run, in its output folder
DEMO = "demo"  # name of the built-in model and dataset

# The prompts of Databricks' announcement of Dolly.
SAMPLE_INSTRUCTIONS = (
    "Write a love letter to Edgar Allan Poe.",
    "Write a tweet announcing Dolly, a large language model from Databricks.",
    "I'm selling my Nikon D-750, write a short blurb for my ad.",
    "Explain to me the difference between nuclear fission and fusion.",
    "Give me a list of 5 science fiction books I should read next.",
)
PAD_TO_MULTIPLE_OF = 8  # as in Dolly v1: tensor cores work on tiles of 8
MOST_TOKENS = 2**24  # of a vocabulary; a larger number is a mistake, and would fill memory

# Memory of one chunk of float32 logits. With a vocabulary of 50,400 this is 1,331 tokens, the responses of 21 average
# Alpaca rows. So most batches are one chunk, and summing weight gradients over chunks seldom adds rounding.
LOSS_CHUNK_BYTES = 256 * 2**20
LARGEST_SHARE = 1.005  # largest share of a device relative to the mean at which batching.deal_by_tokens stops
GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]
# The DeepSpeed JSONs. An installed wheel has them inside the package.
INSTALLED = (ROOT / "training" / "config").is_dir()
CONFIG = ROOT / "training" / "config" if INSTALLED else ROOT / "config"
LEDGER_FILE = "ledger.json"
KINDS = (".json", ".jsonl", ".csv", ".parquet")  # suffixes of files with rows
SOURCE_LOSS = "eval_loss_"  # with the label of a source behind it: its held-out loss, if there are several
METRICS_FILE = "metrics.jsonl"
DEFAULT_PROJECT = "dolly"  # of W&B and Trackio
SAMPLES_FILE = "samples.jsonl"
EVALUATION_FILE = "evaluation.json"
GLOBAL_BATCH = 64  # rows per optimizer step on any number of devices; Dolly v1 used 8 GPUs with 8 rows each

# Dolly's generation settings, also written into the generation config of the finished model.
MAX_NEW_TOKENS = 256
SAMPLING = {"do_sample": True, "top_p": 0.92, "top_k": 0}

# Always the most likely token, so the same model always gives the same answer.
GREEDY: dict[str, Any] = {"do_sample": False, "top_p": None, "top_k": None}

# Environment variable that the supervisor sets for the rank: "terminal" or "log", depending on its stderr.
SUPERVISED = "DOLLY_SUPERVISED"

# Seconds between SIGTERM and the kill: of DeepSpeed's launcher (launcher/launch.py), torchrun
# (elastic/multiprocessing/api.py) and a Kubernetes pod (terminationGracePeriodSeconds).
STOP_SECONDS = 30.0
