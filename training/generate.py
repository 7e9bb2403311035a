"""Generates an answer with a trained model and streams it to the terminal.

python -m training.generate --model OUT "Write a love letter to Edgar Allan Poe."
"""

from __future__ import annotations

import sys

import click
import transformers
from transformers import TextStreamer, set_seed

from training.consts import GREEDY, MAX_NEW_TOKENS
from training.errors import ModelError
from training.model.generation import (
    generate_response,
    generate_responses,
    load_model_tokenizer_for_generate,
)
from training.model.loading import DTYPES

# The public API for Python programs.
__all__ = ["generate_response", "generate_responses", "load_model_tokenizer_for_generate", "main"]


@click.command()
@click.argument("instruction")
@click.option(
    "--model",
    "path",
    required=True,
    help="Output folder of a run, or a model on the Hub. Metaflow: fetch it first with python flows/model_on_s3.py RUN_ID --to FOLDER",
)
@click.option("--input", "context", help="Input text for the instruction.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=MAX_NEW_TOKENS,
    show_default=True,
    help="Longest answer, in tokens.",
)
@click.option("--greedy", is_flag=True, help="Always take the most likely token instead of sampling.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Makes a sampled answer repeatable.")
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help="[default: half precision on a GPU, fp32 on a CPU]",
)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the model's repository.")
def main(
    instruction: str,
    path: str,
    context: str | None,
    max_new_tokens: int,
    greedy: bool,
    seed: int | None,
    dtype: str | None,
    trust_remote_code: bool,
) -> None:
    """Answer INSTRUCTION and stream the answer."""
    for name, text in (("INSTRUCTION", instruction), ("--input", context or "")):
        if text.encode(errors="replace").decode() != text:
            raise click.UsageError(f"{name} {text!r}: is not UTF-8")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, tokenizer = load_model_tokenizer_for_generate(
            path, DTYPES[dtype] if dtype else None, trust_remote_code=trust_remote_code
        )
        if seed is not None:
            set_seed(seed)
        generate_response(
            instruction,
            context,
            model=model,
            tokenizer=tokenizer,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            max_new_tokens=max_new_tokens,
            **(GREEDY if greedy else {}),
        )
    except (ModelError, ValueError) as error:
        print(f"Cannot answer: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
