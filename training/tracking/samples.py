"""Sample answers during training: the model answers the same prompts at regular steps.

Samples are due before the first step, every `--sample-every`, and at the last step, before the checkpoint of that step
is complete. A run that resumes from a checkpoint therefore finds them in samples.jsonl; if a signal left no time for
them, it writes them first. Sampling does not change the training."""

from __future__ import annotations

import random
import textwrap
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState

from training.consts import GREEDY, SAMPLE_TOKENS
from training.data.conversations import Prompt, prompt_text, row_of_prompt
from training.data.table import HISTORY
from training.model.generation import answer_batch, prompt_ids
from training.model.loading import max_positions
from training.ranks import broadcast
from training.storage import metrics
from training.tracking.background import AnswersLog
from training.tracking.progress import print_line, step_label

# Tokens per batch including answers: under 1 GiB of keys and values in GPT-J-6B, less than a step's activations.
TOKENS_AT_ONCE = 2048
MAX_PRINTED = 10  # answers on the console; the file has all


class Samples(TrainerCallback):
    """Generates sample answers. All ranks generate the same answers: ZeRO-3 needs every rank in each forward pass.

    Args:
        prompts: prompts without duplicates; the same on all ranks.
        every: steps between two samplings; may be a fraction.
        file: samples.jsonl, written by rank 0.

    Raises ValueError if the model's positions are too few for a prompt and an answer.
    """

    def __init__(self, trainer: Any, prompts: list[Prompt], every: Fraction, file: Path) -> None:
        self.trainer, self.prompts, self.every, self.file = trainer, prompts, every, file
        self.tokenizer: PreTrainedTokenizerBase = trainer.processing_class
        positions = max_positions(trainer.model.config)
        self.new_tokens = min(SAMPLE_TOKENS, positions // 2)
        self.ids = prompt_ids(self.tokenizer, prompts, positions - self.new_tokens)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if not self._due(state):
            return
        existing = broadcast(self._existing_answers(state) if state.is_world_process_zero else None)
        if len(existing) < len(self.prompts):
            self._sample(state, existing)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        # After a signal there is little time: due samples wait for the resume, except after the last step.
        if state.global_step >= state.max_steps or (self._due(state) and not self.trainer.guard.stopped):
            start = time.perf_counter()
            self._sample(state)
            self.trainer.counter.skip(time.perf_counter() - start)

    def _due(self, state: TrainerState) -> bool:
        """Whether the last step reached a multiple of `every`; true before the first step."""
        return state.global_step // self.every > (state.global_step - 1) // self.every

    def _existing_answers(self, state: TrainerState) -> set[Prompt]:
        """Prompts whose answer of this step is in the file. A killed run may have written only some."""
        entries = [entry for entry in metrics.read(self.file) if entry["step"] == state.global_step]
        columns = ("instruction", "input", HISTORY)
        written = [{name: entry[name] for name in columns if name in entry} for entry in entries]
        return {prompt for prompt in self.prompts if row_of_prompt(prompt) in written}

    def _sample(self, state: TrainerState, existing: Collection[Prompt] = ()) -> None:
        """Prints all answers and writes those that are not `existing` yet. All ranks call it."""
        start = time.monotonic()
        answers = self._generate_answers()
        if not state.is_world_process_zero:
            return
        print_line(self._format_answers(state, answers, time.monotonic() - start))
        position = {"step": state.global_step, "epoch": state.epoch or 0.0}
        entries = [
            position | row_of_prompt(prompt) | {"response": answer}
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        new = [entry for prompt, entry in zip(self.prompts, entries, strict=True) if prompt not in existing]
        metrics.append(self.file, *new)
        callbacks = self.trainer.callback_handler.callbacks
        for log in (callback for callback in callbacks if isinstance(callback, AnswersLog)):
            log.log_answers(state.global_step, entries)

    def _generate_answers(self) -> list[str]:
        """The greedy answer to each prompt, in batches of similar length and at most TOKENS_AT_ONCE tokens."""
        trainer = self.trainer
        answers = [""] * len(self.ids)
        order = sorted(range(len(self.ids)), key=lambda i: len(self.ids[i]), reverse=True)
        generation = GREEDY | {"max_new_tokens": self.new_tokens}
        with _preserve_state(trainer.model):
            while order:
                rows = max(1, TOKENS_AT_ONCE // (len(self.ids[order[0]]) + self.new_tokens))
                batch, order = order[:rows], order[rows:]
                ids = [self.ids[i] for i in batch]
                texts = answer_batch(ids, trainer.model, self.tokenizer, trainer.args.device, **generation)
                for i, text in zip(batch, texts, strict=True):
                    answers[i] = text
        return answers

    def _format_answers(self, state: TrainerState, answers: list[str], seconds: float) -> str:
        lines = [f"{step_label(state)}  epoch {state.epoch or 0:.2f}  answers of the model, {seconds:.1f} s"]
        for prompt, answer in list(zip(self.prompts, answers, strict=True))[:MAX_PRINTED]:
            lines.append(textwrap.indent(prompt_text(prompt), "  "))
            lines.append(textwrap.indent(answer or "(nothing)", "      "))
        if len(answers) > MAX_PRINTED:
            lines.append(f"  and {len(answers) - MAX_PRINTED} more in {self.file}")
        return "\n".join(lines)


@contextmanager
def _preserve_state(model: PreTrainedModel) -> Iterator[None]:
    """Switches to eval mode, and restores the model's mode and all random states on exit."""
    training, cached = model.training, model.config.use_cache
    states = random.getstate(), np.random.get_state()
    gpu = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        # no inference_mode: ZeRO-3 keeps small weights gathered
        with torch.random.fork_rng(devices=gpu), torch.no_grad():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        model.config.use_cache = cached
        model.train(training)
