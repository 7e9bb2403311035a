"""Answers instructions with a trained model: one that is typed, also after earlier turns, or those of a file.

python -m training.generate --model OUT "Write a love letter to Edgar Allan Poe."
python -m training.generate --model OUT - < question.txt
python -m training.generate --model OUT --history conversation.json "And in English?"
python -m training.generate --model OUT --prompts questions.jsonl --output answers.jsonl
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
import transformers
from transformers import TextStreamer, set_seed

from training.console import set_up_console, typed_text
from training.consts import GREEDY, MAX_NEW_TOKENS
from training.data.conversations import Prompt, prompt_of, row_of_prompt
from training.data.prompt_files import read_history, read_prompts
from training.errors import printable
from training.files import can_write
from training.model.generation import (
    BATCH_SIZE,
    answer_prompts,
    generate_response,
    generate_responses,
    load_model_tokenizer_for_generate,
)
from training.model.loading import DTYPES
from training.options.checks import is_utf8
from training.options.command_line import CollectedOption, CollectingCommand, PathName, value_problems

# The public API for Python programs.
__all__ = ["generate_response", "generate_responses", "load_model_tokenizer_for_generate", "main"]

STDIN = STDOUT = "-"  # as INSTRUCTION and as --output


class PrintableStreamer(TextStreamer):
    """Shows an answer as it is generated."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


@click.command(cls=CollectingCommand)
@click.argument("instruction", required=False)
@click.option(
    "--model",
    "model_name",
    required=True,
    help="Output folder of a run, or a model on the Hub. Metaflow: fetch it first with python flows/model_on_s3.py RUN_ID --to FOLDER",
)
@click.option("--input", "input_text", help="Input text for the instruction.")
@click.option(
    "--history",
    "history_file",
    cls=CollectedOption,
    type=PathName("file"),
    metavar="FILE",
    help="The conversation before the instruction: a .json file with OpenAI's messages, or an answer of --output.",
)
@click.option(
    "--prompts",
    "prompts_file",
    cls=CollectedOption,
    type=PathName("file"),
    metavar="FILE",
    help="Answer every instruction of a file instead: a .txt file with one per line, or a .json or .jsonl file with "
    "instruction, input and history, or with messages. The last question of messages is asked; an answer after it is "
    "not read. The answers are lines of JSON, in the file's order.",
)
@click.option(
    "--output",
    cls=CollectedOption,
    type=PathName("file"),
    metavar="FILE",
    help="Write the answers as lines of JSON to a new file, each batch when it is complete.  [default: standard output]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=BATCH_SIZE,
    show_default=True,
    help="Instructions of --prompts to answer at once.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=MAX_NEW_TOKENS,
    show_default=True,
    help="Longest answer, in tokens.",
)
@click.option("--greedy", is_flag=True, help="Always take the most likely token instead of sampling.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Makes a sampled answer repeatable.")
@click.option("--dtype", type=click.Choice([*DTYPES]), help="[default: half precision on a GPU, else fp32]")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the model's repository.")
@click.pass_context
def main(ctx: click.Context, **typed: Any) -> None:
    """Answer INSTRUCTION, and show the answer while it is written. The INSTRUCTION - is read from standard input."""
    set_up_console()
    _answer(value_problems(ctx), **typed)


def _answer(
    typing_errors: list[str],
    instruction: str | None,
    model_name: str,
    input_text: str | None,
    history_file: str | None,
    prompts_file: str | None,
    output: str | None,
    batch_size: int,
    max_new_tokens: int,
    greedy: bool,
    seed: int | None,
    dtype: str | None,
    trust_remote_code: bool,
) -> None:
    """Checks what was typed, loads the model and answers. Ends with exit code 2 if that is not possible."""
    instruction, input_text = (text and typed_text(text) for text in (instruction, input_text))
    if instruction == STDIN:
        instruction = _read_stdin()
    problems = [*typing_errors, *_problems(instruction, input_text, history_file, prompts_file, output)]
    if greedy and seed is not None:
        problems.append(f"--seed {seed}: has no effect with --greedy. Leave one of them out")
    if prompts_file is None and batch_size != BATCH_SIZE:
        problems.append(f"--batch-size {batch_size}: has no effect without --prompts. Leave it out")
    if problems:
        raise click.UsageError("\n".join(problems))
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    generation = {"max_new_tokens": max_new_tokens, **(GREEDY if greedy else {})}
    try:
        if prompts_file is None:
            history = read_history(history_file) if history_file else ()
            prompts = [prompt_of(str(instruction), input_text, history)]
        else:
            prompts = read_prompts(prompts_file, unique=False)
        model, tokenizer = load_model_tokenizer_for_generate(
            model_name, DTYPES[dtype] if dtype else None, trust_remote_code=trust_remote_code
        )
        if seed is not None:
            set_seed(seed)
        loaded: dict[str, Any] = {"model": model, "tokenizer": tokenizer, **generation}
        if prompts_file is not None or output is not None:
            _answer_as_json(prompts, output or STDOUT, batch_size, **loaded)
        else:
            streamer = PrintableStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            answer_prompts(prompts, streamer=streamer, **loaded)
    except OSError as error:  # a full disk
        if output in (None, STDOUT):
            raise
        _end(f"--output {output}: could not be written ({error.strerror}). Make room, and name a new file")
    except torch.OutOfMemoryError:
        _end(
            "the GPU ran out of memory. Lower --max-new-tokens" + (" or --batch-size" if prompts_file else "")
        )
    except ValueError as error:  # includes DataError and ModelError
        _end(str(error))


def _end(reason: str) -> NoReturn:
    print(f"Cannot answer: {printable(reason)}", file=sys.stderr)
    sys.exit(2)


def _read_stdin() -> str:
    """The text of standard input. Raises UsageError if it is not UTF-8."""
    content = sys.stdin.buffer.read() if sys.stdin else b""
    try:
        return content.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"standard input: not UTF-8 at byte {error.start:,}. Type it as UTF-8"
        ) from error


def _problems(
    instruction: str | None,
    input_text: str | None,
    history_file: str | None,
    prompts_file: str | None,
    output: str | None,
) -> list[str]:
    """What is wrong with the options, before anything is read or loaded."""
    problems = []
    for name, text in (("INSTRUCTION", instruction), ("--input", input_text)):
        if text and not is_utf8(text):
            problems.append(f"{name} {text!r}: is not UTF-8")
    for name, path in (("--history", history_file), ("--prompts", prompts_file), ("--output", output)):
        if path is not None and not path.strip():  # e.g. from an unset shell variable
            return [*problems, f"{name} is empty. Give a value, or leave the option out"]
    if prompts_file is not None and (instruction is not None or input_text is not None):
        problems.append("--prompts has instructions and inputs of its own. Leave out INSTRUCTION and --input")
    elif prompts_file is not None and history_file is not None:
        problems.append("--prompts has histories of its own, in the column history. Leave out --history")
    elif prompts_file is None and not (instruction or "").strip():
        problems.append(
            "INSTRUCTION is empty. Type it, or - to read it from standard input, or --prompts FILE"
        )
    if output is not None and output != STDOUT:
        target = Path(os.path.expanduser(output))
        if os.path.lexists(target):
            problems.append(f"--output {output}: exists already. Name a new file")
        elif not can_write(target):
            problems.append(f"--output {output}: cannot be written. Name a file in a folder of your own")
    return problems


def _answer_as_json(prompts: Sequence[Prompt], output: str, batch_size: int, **generation: Any) -> None:
    """Writes {"instruction", "input", "response"} of each prompt, in order, as soon as its batch is complete.

    A prompt after a conversation has it as "history".
    """
    # Escaped on standard output: an answer must not change a terminal, which may also be ASCII only.
    escaped = output == STDOUT
    with click.open_file(os.path.expanduser(output), "x", encoding="utf-8") as stream:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            responses = answer_prompts(batch, batch_size=batch_size, **generation)
            for prompt, response in zip(batch, responses, strict=True):
                line = row_of_prompt(prompt) | {"response": response}
                print(json.dumps(line, ensure_ascii=escaped), file=stream)
            stream.flush()


if __name__ == "__main__":
    main()
