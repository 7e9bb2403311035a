"""Answers over time: the same instructions, answered by the model as it trains, which training does not feel.

A stage is due before the first step, every `--sample-every`, and at the last step, always before the checkpoint of its
step is complete: who goes on from there finds its answers in samples.jsonl, or, where a signal left no time for them,
gives them first."""

from __future__ import annotations

import random
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from training.consts import GREEDY, SAMPLE_TOKENS
from training.model.generation import answer_batch, printable, prompt_ids
from training.model.loading import max_positions
from training.storage import metrics
from training.tracking.callbacks import Curves
from training.tracking.progress import place, write

# Tokens of a batch, answers included: under 1 GiB of keys and values in GPT-J-6B, less than a step's activations.
TOKENS_AT_ONCE = 2048
SHOWN = 10  # answers of a stage on the console; all are in the file


class Samples(TrainerCallback):
    """Asks the model at every stage. All ranks give the same answers, as ZeRO-3 needs all of them in every forward.

    Args:
        asked: (instruction, input) of each prompt, no two alike; the same on all ranks.
        every: steps between two stages; need not be whole.
        file: samples.jsonl. Rank 0 writes it.
        curves: where TensorBoard finds the answers; None on the other ranks.

    Raises ValueError where the model's positions hold no prompt beside an answer.
    """

    def __init__(
        self,
        trainer: Any,
        asked: list[tuple[str, str]],
        every: Fraction,
        file: Path,
        curves: Curves | None = None,
    ) -> None:
        self.trainer = trainer
        self.asked = asked
        self.every = every
        self.file = file
        self.curves = curves
        self.tokenizer: PreTrainedTokenizerBase = trainer.processing_class
        positions = max_positions(trainer.model.config)
        self.new_tokens = min(SAMPLE_TOKENS, positions // 2)
        instructions, inputs = zip(*asked, strict=True)
        self.prompts = prompt_ids(self.tokenizer, instructions, inputs, positions - self.new_tokens)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._due(state):
            return
        there = [self._there(state) if state.is_world_process_zero else None]
        if args.world_size > 1:
            torch.distributed.broadcast_object_list(there, src=0)
        if len(there[0] or []) < len(self.asked):
            self._stage(state, there[0] or [])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A signal leaves little time: what was due is asked when the run goes on, which it does not after the last step.
        if state.global_step >= state.max_steps or (self._due(state) and not self.trainer.guard.stopped):
            begin = time.perf_counter()
            self._stage(state, [])
            self.trainer.counter.skip(time.perf_counter() - begin)

    def _due(self, state: TrainerState) -> bool:
        """Whether a multiple of `every` lies in the step that was just done, or none has been done."""
        return state.global_step // self.every > (state.global_step - 1) // self.every

    def _there(self, state: TrainerState) -> list[tuple[str, str]]:
        """The prompts that have an answer of this step; not all, where a kill tore the last line."""
        entries = [entry for entry in metrics.read(self.file) if entry["step"] == state.global_step]
        answered = {(entry.get("instruction"), entry.get("input")) for entry in entries}
        return [prompt for prompt in self.asked if prompt in answered]

    def _stage(self, state: TrainerState, there: list[tuple[str, str]]) -> None:
        """Answers, shows and keeps them, without those that are `there`. All ranks call it."""
        begin = time.monotonic()
        answers = self._answers()
        if not state.is_world_process_zero:
            return
        write(self._shown(state, answers, time.monotonic() - begin))
        entries = [
            {
                "step": state.global_step,
                "epoch": state.epoch or 0.0,
                "instruction": instruction,
                "input": context,
                "response": answer,
            }
            for (instruction, context), answer in zip(self.asked, answers, strict=True)
            if (instruction, context) not in there
        ]
        metrics.append(self.file, *entries)
        if self.curves is not None:
            for number, ((instruction, context), answer) in enumerate(zip(self.asked, answers, strict=True)):
                question = f"{instruction}\n\n{context}".strip()
                # As code, which Markdown leaves as it is.
                blocks = [textwrap.indent(text or "(nothing)", "    ") for text in (question, answer)]
                self.curves.add_text(
                    f"answers/{number:03}", "\n\nis answered by\n\n".join(blocks), state.global_step
                )

    def _answers(self) -> list[str]:
        """The greedy answer to each prompt. Rows of like length share a batch of at most TOKENS_AT_ONCE."""
        model = self.trainer.model
        answers = [""] * len(self.prompts)
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]), reverse=True)
        with _untouched(model):
            while order:
                rows = max(1, TOKENS_AT_ONCE // (len(self.prompts[order[0]]) + self.new_tokens))
                batch, order = order[:rows], order[rows:]
                texts = answer_batch(
                    [self.prompts[i] for i in batch],
                    model,
                    self.tokenizer,
                    self.trainer.args.device,
                    max_new_tokens=self.new_tokens,
                    **GREEDY,
                )
                for i, text in zip(batch, texts, strict=True):
                    answers[i] = text
        return answers

    def _shown(self, state: TrainerState, answers: list[str], seconds: float) -> str:
        lines = [f"{place(state)}  epoch {state.epoch or 0:.2f}  answers of the model, {seconds:.1f} s"]
        for (instruction, context), answer in list(zip(self.asked, answers, strict=True))[:SHOWN]:
            lines.append(textwrap.indent(printable(f"{instruction}\n{context}".strip()), "  "))
            lines.append(textwrap.indent(printable(answer) or "(nothing)", "      "))
        if len(answers) > SHOWN:
            lines.append(f"  and {len(answers) - SHOWN} more in {self.file}")
        return "\n".join(lines)


@contextmanager
def _untouched(model: PreTrainedModel) -> Iterator[None]:
    """Leaves the model as it was, and every random number that training would have drawn still to be drawn."""
    training, cached = model.training, model.config.use_cache
    states = random.getstate(), np.random.get_state()
    gpu = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with (
            torch.random.fork_rng(devices=gpu),
            torch.no_grad(),
        ):  # no inference_mode: ZeRO-3 keeps small weights gathered
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        model.config.use_cache = cached
        model.train(training)
