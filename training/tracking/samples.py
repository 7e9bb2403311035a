"""Answers over time: the model answers the same instructions at every stage, and training does not feel it.

A stage is due before the first step, every `--sample-every`, and at the last step, always before the checkpoint of its
step is complete. So a run that goes on from a checkpoint finds its answers in samples.jsonl, or, where a signal left no
time for them, gives them first."""

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
from training.model.generation import answer_batch, printable, prompt_ids
from training.model.loading import max_positions
from training.ranks import broadcast
from training.storage import metrics
from training.tracking.callbacks import Curves
from training.tracking.progress import place, write

# Tokens of a batch, answers included: under 1 GiB of keys and values in GPT-J-6B, less than a step's activations.
TOKENS_AT_ONCE = 2048
SHOWN = 10  # answers of a stage on the console; all are in the file


class Samples(TrainerCallback):
    """Asks the model at every stage. All ranks give the same answers, as ZeRO-3 needs all of them in every forward.

    Args:
        prompts: (instruction, input) of each, no two alike; the same on all ranks.
        every: steps between two stages; need not be whole.
        file: samples.jsonl. Rank 0 writes it.

    Raises ValueError where the model's positions hold no prompt beside an answer.
    """

    def __init__(self, trainer: Any, prompts: list[tuple[str, str]], every: Fraction, file: Path) -> None:
        self.trainer, self.prompts, self.every, self.file = trainer, prompts, every, file
        self.tokenizer: PreTrainedTokenizerBase = trainer.processing_class
        positions = max_positions(trainer.model.config)
        self.new_tokens = min(SAMPLE_TOKENS, positions // 2)
        instructions, inputs = zip(*prompts, strict=True)
        self.ids = prompt_ids(self.tokenizer, instructions, inputs, positions - self.new_tokens)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if not self._due(state):
            return
        answered = broadcast(self._answered(state) if state.is_world_process_zero else None)
        if len(answered) < len(self.prompts):
            self._stage(state, answered)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        # A signal leaves little time: a due stage waits until the run goes on, which it does not after the last step.
        if state.global_step >= state.max_steps or (self._due(state) and not self.trainer.guard.stopped):
            begin = time.perf_counter()
            self._stage(state)
            self.trainer.counter.skip(time.perf_counter() - begin)

    def _due(self, state: TrainerState) -> bool:
        """Whether a multiple of `every` lies in the step that was just done, or none has been done."""
        return state.global_step // self.every > (state.global_step - 1) // self.every

    def _answered(self, state: TrainerState) -> set[tuple[str, str]]:
        """The prompts that have an answer of this step; not all, where a kill tore the last line."""
        entries = [entry for entry in metrics.read(self.file) if entry["step"] == state.global_step]
        return set(self.prompts) & {(entry.get("instruction"), entry.get("input")) for entry in entries}

    def _stage(self, state: TrainerState, answered: Collection[tuple[str, str]] = ()) -> None:
        """Shows the answers, and keeps those that are not `answered` yet. All ranks call it."""
        begin = time.monotonic()
        answers = self._answers()
        if not state.is_world_process_zero:
            return
        write(self._shown(state, answers, time.monotonic() - begin))
        at = {"step": state.global_step, "epoch": state.epoch or 0.0}
        entries = [
            at | {"instruction": instruction, "input": context, "response": answer}
            for (instruction, context), answer in zip(self.prompts, answers, strict=True)
            if (instruction, context) not in answered
        ]
        metrics.append(self.file, *entries)
        for curves in (each for each in self.trainer.callback_handler.callbacks if isinstance(each, Curves)):
            for number, (prompt, answer) in enumerate(zip(self.prompts, answers, strict=True)):
                # Indented: Markdown leaves code as it is.
                texts = _question(prompt, 2), answer
                blocks = (textwrap.indent(text or "(nothing)", "    ") for text in texts)
                text = "\n\nis answered by\n\n".join(blocks)
                curves.add_text(f"answers/{number:03}", text, state.global_step)

    def _answers(self) -> list[str]:
        """The greedy answer to each prompt. Rows of like length share a batch of at most TOKENS_AT_ONCE."""
        trainer = self.trainer
        answers = [""] * len(self.ids)
        order = sorted(range(len(self.ids)), key=lambda i: len(self.ids[i]), reverse=True)
        generation = GREEDY | {"max_new_tokens": self.new_tokens}
        with _untouched(trainer.model):
            while order:
                rows = max(1, TOKENS_AT_ONCE // (len(self.ids[order[0]]) + self.new_tokens))
                batch, order = order[:rows], order[rows:]
                ids = [self.ids[i] for i in batch]
                texts = answer_batch(ids, trainer.model, self.tokenizer, trainer.args.device, **generation)
                for i, text in zip(batch, texts, strict=True):
                    answers[i] = text
        return answers

    def _shown(self, state: TrainerState, answers: list[str], seconds: float) -> str:
        lines = [f"{place(state)}  epoch {state.epoch or 0:.2f}  answers of the model, {seconds:.1f} s"]
        for prompt, answer in list(zip(self.prompts, answers, strict=True))[:SHOWN]:
            lines.append(textwrap.indent(printable(_question(prompt)), "  "))
            lines.append(textwrap.indent(printable(answer) or "(nothing)", "      "))
        if len(answers) > SHOWN:
            lines.append(f"  and {len(answers) - SHOWN} more in {self.file}")
        return "\n".join(lines)


def _question(prompt: tuple[str, str], newlines: int = 1) -> str:
    return ("\n" * newlines).join(prompt).strip()


@contextmanager
def _untouched(model: PreTrainedModel) -> Iterator[None]:
    """Leaves the model as it was, and every random number that training would have drawn still to be drawn."""
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
