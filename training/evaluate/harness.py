"""Benchmarks of lm-eval, the EleutherAI evaluation harness, asked in Dolly's prompt or as plain text."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from numbers import Real  # those of Python and of numpy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from training.consts import DEFAULT_SEED
from training.data.encoding import encode_text
from training.data.prompt import RESPONSE_KEY
from training.errors import DataError, first_line, offline_note
from training.evaluate.answers import Loading, free_memory
from training.evaluate.intervals import percentile_interval, resampled_sums
from training.model.generation import load_model_tokenizer_for_generate
from training.model.loading import max_positions
from training.model.tokenizer import generation_config

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about models that are not given by name

YAML = (".yaml", ".yml")
PROMPTS = {"dolly": "in Dolly's prompt", "plain": "as plain text"}


class DollyModel(HFLM):
    """lm-eval's model of a causal language model, with the ids of training in Dolly's prompt.

    lm-eval moves white space from the end of a context to the continuation. Dolly's response key ends with a line break
    that belongs to the token, so in Dolly's prompt nothing would be left to score, and it stops with an error.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, prompt: str
    ) -> None:
        settings = generation_config(tokenizer)
        # Without Dolly's sampling and length, which would replace those of the tasks.
        model.generation_config = GenerationConfig(
            bos_token_id=settings.bos_token_id,
            eos_token_id=settings.eos_token_id,
            pad_token_id=settings.pad_token_id,
        )
        self.in_dolly_prompt = prompt == "dolly"
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_positions(model.config),
        )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of the prompt, up to and including its response key, and of the text that follows it.

        A context may go on after the response key: a task may begin the answer, as with "Answer:". White space at the
        end of such a beginning is scored with the continuation, as lm-eval does.
        """
        end = context.rfind(RESPONSE_KEY) + len(RESPONSE_KEY)
        if not self.in_dolly_prompt or end < len(RESPONSE_KEY):
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        beginning = context[end:]
        # The chat template has rendered BOS as well, where the tokenizer has one.
        prompt = self.tokenizer.encode(context[:end], add_special_tokens=False)
        [known, whole] = encode_text(self.tokenizer, [beginning.rstrip(), beginning + continuation])
        return [*prompt, *known], whole[len(known) :]


def find_tasks(names: str) -> tuple[list[str], TaskManager]:
    """The tasks in a list such as "hellaswag,my/task.yaml", and the manager that loads them.

    Raises DataError for unknown names, with the nearest ones.
    """
    tasks = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    known = [name for name in tasks if not name.endswith(YAML)]
    files = [name for name in tasks if name.endswith(YAML)]
    problems = [f"{name}: no such file" for name in files if not Path(name).expanduser().is_file()]
    manager = TaskManager(include_defaults=bool(known))  # reading its 14,000 tasks takes ten seconds
    for name in known:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            nearest = f"The nearest names are {', '.join(near)}" if near else "lm-eval ls tasks lists them"
            problems.append(f"{name}: lm-eval {version('lm-eval')} has no such task. {nearest}")
    if not tasks:
        problems.append(f"{names!r} names no task")
    if problems:
        raise DataError("--tasks " + "\n--tasks ".join(problems))
    return [str(Path(name).expanduser()) if name in files else name for name in tasks], manager


def compare_on_tasks(
    tasks: Sequence[str],
    manager: TaskManager,
    base: str,
    tuned: str,
    loading: Loading,
    prompt: str = "dolly",
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Runs the tasks with both models, one after the other. Returns a section of evaluation.json.

    Args:
        tasks, manager: from `find_tasks`.
        prompt: "dolly" or "plain"; solved examples become earlier turns of the chat in Dolly's prompt.
        limit: questions of each task; None for all.
        num_fewshot: solved examples before each question; None for the task's own number.

    Raises DataError for data that cannot be loaded, and ModelError.
    """
    results, dtypes = [], []
    for name in (base, tuned):
        model, tokenizer = load_model_tokenizer_for_generate(
            name, loading.dtype, trust_remote_code=loading.trust_remote_code
        )
        dtypes.append(str(model.dtype).removeprefix("torch."))
        results.append(
            run_tasks(
                DollyModel(model, tokenizer, loading.batch_size, prompt), tasks, manager, limit, num_fewshot
            )
        )
        del model
        free_memory()
    return {
        "base": base,
        "tuned": tuned,
        "settings": {
            "prompt": PROMPTS[prompt],
            "num_fewshot": num_fewshot,
            "limit": limit,
            "dtype": dict(zip(("base", "tuned"), dtypes, strict=True)),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "lm-eval")},
        "notes": _notes(limit, num_fewshot),
        "tasks": {
            task: {
                "num_fewshot": results[1]["n-shot"].get(task),
                "version": results[1]["versions"].get(task),
                "metrics": compare_results(results[0], results[1], task),
            }
            for task in results[1]["results"]
        },
    }


def _notes(limit: int | None, num_fewshot: int | None) -> list[str]:
    shots = "the tasks' own number of" if num_fewshot is None else f"{num_fewshot:,}"
    counted = "all questions" if limit is None else f"the first {limit:,} questions of each task"
    return [f"lm-eval {version('lm-eval')}: {counted}, {shots} solved examples before each"]


def run_tasks(
    model: DollyModel,
    tasks: Sequence[str],
    manager: TaskManager,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """The results of lm-eval for one model. Raises DataError if a task cannot be run, and torch.OutOfMemoryError."""
    try:
        results: dict[str, Any] = simple_evaluate(
            model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=model.in_dolly_prompt,
            bootstrap_iters=0,  # intervals are ours
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of datasets, the Hub, a YAML file, its templates and its Python functions
        if "confirm_run_unsafe_code" in str(error):
            raise DataError(
                f"--tasks {','.join(tasks)}: a task runs code that the model writes, which this command does not do. "
                "Leave the task out"
            ) from error
        raise DataError(
            f"--tasks {','.join(tasks)}: lm-eval cannot run them ({first_line(error)}){offline_note()}"
        ) from error
    return results


def compare_results(base: Mapping[str, Any], tuned: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Each metric of a task by name: {"base": {"value", "low", "high"}, "tuned": ..., "difference": ...}.

    The values are those of lm-eval. A metric that is the mean of its questions has intervals.
    """
    metrics: dict[str, Any] = {}
    for key, value in base["results"][task].items():
        name, _, chosen_filter = key.partition(",")
        if not isinstance(value, Real) or name.endswith("_stderr") or not chosen_filter:
            continue
        values = [float(results["results"][task][key]) for results in (base, tuned)]
        label = name if chosen_filter == "none" else f"{name} ({chosen_filter})"
        questions = [_questions(results, task, name, chosen_filter) for results in (base, tuned)]
        if not all(questions) or not np.allclose([np.mean(scores) for scores in questions], values):
            metrics[label] = {
                place: {"value": number, "low": None, "high": None}
                for place, number in zip(
                    ("base", "tuned", "difference"), [*values, values[1] - values[0]], strict=True
                )
            }
            continue
        sums = resampled_sums(np.stack(questions, axis=1), DEFAULT_SEED) / len(questions[0])
        metrics[label] = {
            "base": asdict(percentile_interval(values[0], sums[:, 0])),
            "tuned": asdict(percentile_interval(values[1], sums[:, 1])),
            "difference": asdict(percentile_interval(values[1] - values[0], sums[:, 1] - sums[:, 0])),
        }
    return metrics


def _questions(results: Mapping[str, Any], task: str, metric: str, chosen_filter: str) -> list[float]:
    """The metric of each question, in order; [] if lm-eval computes it from more than single numbers."""
    samples = results.get("samples", {}).get(task, [])
    found = [
        (sample["doc_id"], sample.get(metric)) for sample in samples if sample["filter"] == chosen_filter
    ]
    if not all(isinstance(value, Real) for _, value in found):
        return []
    return [float(value) for _, value in sorted(found)]
