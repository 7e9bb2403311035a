"""Token counts of a batch, and the progress lines on the console."""

from __future__ import annotations

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from training.data.collator import DataCollatorForCompletionOnlyLM, DataCollatorForPackedRows
from training.run.completion_trainer import StepCounter
from training.tracking.callbacks import TensorBoardLog
from training.tracking.progress import ProgressLog, duration

ROWS = [
    {"input_ids": [11, 12, 13, 14, 15], "response_spans": [[3, 5]]},
    {"input_ids": [21, 22, 23], "response_spans": [[2, 3]]},
]


@pytest.mark.parametrize("error", [PermissionError("Permission denied"), Exception("TensorFlow's")])
def test_tensorboard_that_cannot_write_ends_no_training(error, tmp_path, monkeypatch, caplog):
    def refuse(*of, **how):
        raise error

    monkeypatch.setattr("transformers.integrations.TensorBoardCallback.on_train_begin", refuse)
    log = TensorBoardLog(tmp_path / "runs")
    log.on_train_begin(None, None, None)
    log.log_answers(1, [{"instruction": "a", "input": "", "response": "never written"}])
    [record] = caplog.records
    assert record.getMessage() == f"{tmp_path}/runs: no more TensorBoard logs ({error}); training continues"


@pytest.mark.parametrize(
    ("collator", "sums"),  # real, computed, labels, squared lengths
    [
        (DataCollatorForPackedRows, [8, 8, 3, 25 + 9]),
        (DataCollatorForCompletionOnlyLM, [8, 16, 3, 25 + 9]),
    ],
    ids=["packed", "padded, padding counts as computed"],
)
def test_token_counts_of_batches_are_summed_until_they_are_taken(collator, sums):
    batch, counter = collator(pad_token_id=0)(ROWS), StepCounter()
    counter.add(batch)
    counted, seconds = counter.take()
    assert counted.tolist() == sums
    assert seconds > 0
    counter.add(batch)
    counter.add(batch)
    assert counter.take()[0].tolist() == [2 * count for count in sums]
    assert counter.take()[0].tolist() == [0, 0, 0, 0]


def test_evaluation_time_is_not_counted_in_the_speed():
    counter = StepCounter()
    counter.skip(100.0)
    assert counter.take()[1] < 0


def test_time_before_the_first_batch_is_not_counted_in_the_speed():
    counter = StepCounter()
    counter.begin -= 1000  # spent on loading, evaluation and samples
    counter.add(DataCollatorForPackedRows(pad_token_id=0)(ROWS))
    assert counter.take()[1] < 100
    counter.begin -= 1000
    counter.add(DataCollatorForPackedRows(pad_token_id=0)(ROWS))
    assert counter.take()[1] > 100


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")]
)
def test_durations_are_formatted_as_hours_minutes_and_seconds(seconds, text):
    assert duration(seconds) == text


def lines(tmp_path, capsys, logs, **state):
    log = ProgressLog()
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    before, now = TrainerState(max_steps=100), TrainerState(max_steps=100, **state)
    log.on_train_begin(args, before, TrainerControl())
    log.on_step_begin(args, before, TrainerControl())
    log.on_log(args, now, TrainerControl(), logs=logs)
    return capsys.readouterr().out


def test_a_logged_step_is_one_line_with_units_and_the_time_left(tmp_path, capsys):
    logs = {"loss": 1.25, "learning_rate": 1e-5, "grad_norm": 0.5}
    speed = {"tokens_per_second": 12345.6, "real_token_share": 0.34, "mfu": 0.5, "peak_memory_gib": 31.26}
    printed = lines(tmp_path, capsys, logs | speed, global_step=10)
    assert printed.startswith(
        "step 10/100  loss 1.2500  rate 1.00e-05  gradient norm 0.50"
        "  12,346 tokens/s, 34% of computed tokens  MFU 50%  31.3 GiB"
    )
    assert printed.rstrip().endswith("left")
    assert printed.count("\n") == 1


def test_the_held_out_loss_is_printed_on_a_line_of_its_own(tmp_path, capsys):
    printed = lines(tmp_path, capsys, {"eval_loss": 2.5}, global_step=100)
    assert printed == "step 100/100  held-out loss 2.5000\n"
