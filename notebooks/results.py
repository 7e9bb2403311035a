"""Functions called by the last cells of train_dolly.py: where the model is, how to use it, and how much it gained."""

from __future__ import annotations

from notebooks.cells import Choices, Table, finished_record


def usage(choices: Choices) -> str:
    """Where the finished model is, and the code that asks it. Raises RunRefusedError unless the run has finished."""
    finished_record(choices)
    published = choices.published or "nowhere, because dbfs_output_root is empty"
    has_copy = choices.published and "://" not in choices.published  # transformers loads no URL
    folder = choices.published if has_copy else choices.output
    return f"""The model is in     {choices.output}
and published to    {published}

from training.generate import generate_response, load_model_tokenizer_for_generate

model, tokenizer = load_model_tokenizer_for_generate("{folder}")
generate_response("Name three colours.", model=model, tokenizer=tokenizer)

or without this repository:

from transformers import pipeline

ask = pipeline("text-generation", model="{folder}")
ask([{{"role": "user", "content": "Name three colours."}}])"""


def evaluation(choices: Choices, rows: int) -> Table | None:
    """Compares base and trained model on the first `rows` held-out rows, and writes the results into the run's folder.

    Shows those of the run if it has been evaluated already. None with a message if `rows` is 0, if a package is
    missing, or if the rows or the base cannot be read.
    """
    record = finished_record(choices)
    import transformers

    from training.errors import DataError, ModelError
    from training.evaluate.answers import Loading, compare_models
    from training.evaluate.metrics import missing_extra
    from training.evaluate.report import HEADINGS, notes_of, read_evaluation, tables_of, write_evaluation
    from training.evaluate.rows import held_out_rows
    from training.model.tokenizer import load_tokenizer

    known = read_evaluation(choices.output)
    if "held_out" not in known:
        problems = [] if rows else ["rows is 0"]
        if problems := problems or missing_extra("rouge_score"):
            print(f"Not evaluated: {problems[0]}")
            return None
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        try:
            held_out = held_out_rows(choices.output, record, load_tokenizer(str(choices.output))).first(rows)
            section = compare_models(held_out, choices.input_model, str(choices.output), Loading())
        except (DataError, ModelError) as error:
            print(f"Not evaluated: {error}")
            return None
        known = write_evaluation(choices.output, {"held_out": section})
    shown = {"held_out": known["held_out"]}
    print("\n".join(notes_of(shown)))
    (title, lines), *parts = tables_of(shown)  # parts: one for each source or category
    for name, of_part in parts:
        lines += [(f"{name}:", *[""] * len(HEADINGS)), *of_part]
    return Table([title, *HEADINGS], lines)
