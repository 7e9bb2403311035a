"""Texts of servers and libraries without passwords and tokens."""

from __future__ import annotations

import os
import re

SECRETS = (
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "DATABRICKS_TOKEN",
    "DATABRICKS_CLIENT_SECRET",
    "WANDB_API_KEY",
    "HF_TOKEN",
    "TRACKIO_WRITE_TOKEN",
)


def without_secrets(text: object) -> str:
    """A text as one log line of at most 300 characters, without passwords and tokens."""
    line = " ".join(str(text).split())
    for name in SECRETS:
        if secret := os.environ.get(name):
            line = line.replace(secret, "***")
    line = re.sub(r"//[^/\s]*@", "//***@", line)
    line = re.sub(r"\?[^\s'\")]+=[^\s'\")]+", "?***", line)
    return line if len(line) <= 300 else line[:299] + "…"


def reason(error: Exception) -> str:
    """What an error says, as `without_secrets`; its type if it says nothing."""
    return without_secrets(error) or type(error).__name__
