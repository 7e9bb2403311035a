"""Dolly's defaults, the names of files, and numbers that several rooms share. Imports nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

IGNORE_INDEX = -100  # torch's cross entropy skips targets of this value
DEFAULT_INPUT_MODEL = "EleutherAI/gpt-j-6B"
DEFAULT_TRAINING_DATASET = "tatsu-lab/alpaca"
DEFAULT_SEED = 42
DEFAULT_TEST_SIZE = 1000  # rows held out
DEFAULT_LEARNING_RATE = 1e-5
SAMPLE_TOKENS = 128  # longest answer of a model that is asked while it trains
WEIGHTS = ".safetensors"  # how the name of a weight file ends
RUN_FILE = "run.json"  # the record of a run, in its output folder
DEMO = "demo"  # the name of the embedded model and dataset, wherever a model or dataset is asked for

# What Databricks showed when it announced Dolly.
SAMPLE_INSTRUCTIONS = (
    "Write a love letter to Edgar Allan Poe.",
    "Write a tweet announcing Dolly, a large language model from Databricks.",
    "I'm selling my Nikon D-750, write a short blurb for my ad.",
    "Explain to me the difference between nuclear fission and fusion.",
    "Give me a list of 5 science fiction books I should read next.",
)
PAD_TO_MULTIPLE_OF = 8  # Dolly's; tensor cores work on tiles of 8

# Memory of one chunk of float32 logits. At 50,400 entries it is 1,331 tokens: the responses of 21 mean rows of
# Alpaca, so most shares are one chunk, and the sum of weight gradients over chunks is seldom rounded twice.
LOSS_CHUNK_BYTES = 256 * 2**20
LARGEST_SHARE = 1.005  # of the mean: where batching.deal_by_tokens stops swapping
GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]
LEDGER_FILE = "ledger.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
GLOBAL_BATCH = 64  # rows of one optimizer step, whatever the devices; Dolly's run had 8 GPUs of 8 rows

# What Dolly generated with, and the most useful defaults for whoever loads the folder.
MAX_NEW_TOKENS = 256
SAMPLING = {"do_sample": True, "top_p": 0.92, "top_k": 0}

# The likeliest token each time: the same model always gives the same answer.
GREEDY: dict[str, Any] = {"do_sample": False, "top_p": None, "top_k": None}

# Set by the supervisor for the rank proper; its value tells whether somebody looks at a terminal.
SUPERVISED = "DOLLY_SUPERVISED"
