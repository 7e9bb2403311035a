"""What a person sees: counts of a batch, and the lines of the log."""

from __future__ import annotations

from contextlib import suppress

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from tests.conftest import mounted
from training.data.collator import DataCollatorForCompletionOnlyLM, DataCollatorForPackedRows, count_labels
from training.run.completion_trainer import StepCounter
from training.tracking.callbacks import Curves
from training.tracking.progress import ProgressLog, duration

ROWS = [
    {"input_ids": [11, 12, 13, 14, 15], "response_start": 3},
    {"input_ids": [21, 22, 23], "response_start": 2},
]


def test_a_packed_batch_counts_real_tokens_alone():
    counter = StepCounter()
    counter.add(DataCollatorForPackedRows(pad_token_id=0)(ROWS))
    sums, seconds = counter.take()
    assert sums.tolist() == [8, 8, 3, 25 + 9]  # real, computed, labels, squared lengths
    assert seconds > 0
    assert counter.take()[0].tolist() == [0, 0, 0, 0]


def test_a_padded_batch_counts_its_padding_as_computed():
    counter = StepCounter()
    batch = DataCollatorForCompletionOnlyLM(pad_token_id=0)(ROWS)
    counter.add(batch)
    counter.add(batch)
    assert counter.take()[0].tolist() == [16, 32, 6, 68]


def test_time_of_an_evaluation_is_no_part_of_the_speed():
    counter = StepCounter()
    counter.skip(100.0)
    assert counter.take()[1] < 0


def test_what_came_before_the_first_batch_is_no_part_of_the_speed():
    counter = StepCounter()
    counter.begin -= 1000  # of loading, measuring and answering
    counter.add(DataCollatorForPackedRows(pad_token_id=0)(ROWS))
    assert counter.take()[1] < 100
    counter.begin -= 1000
    counter.add(DataCollatorForPackedRows(pad_token_id=0)(ROWS))
    assert counter.take()[1] > 100


def test_both_collators_have_the_same_number_of_labels():
    for collator in (DataCollatorForPackedRows, DataCollatorForCompletionOnlyLM):
        assert count_labels(collator(pad_token_id=0)(ROWS)) == 3


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")]
)
def test_durations_read_as_a_clock(seconds, text):
    assert duration(seconds) == text


def lines(tmp_path, capsys, logs, **state):
    log = ProgressLog()
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    now = TrainerState(max_steps=100, **state)
    log.on_train_begin(args, TrainerState(max_steps=100), TrainerControl())
    log.on_step_begin(args, TrainerState(max_steps=100), TrainerControl())
    log.on_log(args, now, TrainerControl(), logs=logs)
    return capsys.readouterr().out


def test_a_step_is_one_line_with_units_and_the_time_left(tmp_path, capsys):
    logs = {
        "loss": 1.25,
        "learning_rate": 1e-5,
        "grad_norm": 0.5,
        "tokens_per_second": 12345.6,
        "real_token_share": 0.34,
        "mfu": 0.5,
        "peak_memory_gib": 31.26,
    }
    printed = lines(tmp_path, capsys, logs, global_step=10)
    assert printed.startswith(
        "step 10/100  loss 1.2500  rate 1.00e-05  gradient norm 0.50"
        "  12,346 tokens/s, 34% of those computed  MFU 50%  31.3 GiB"
    )
    assert printed.rstrip().endswith("left")
    assert printed.count("\n") == 1


def test_the_held_out_loss_has_its_line(tmp_path, capsys):
    assert (
        lines(tmp_path, capsys, {"eval_loss": 2.5}, global_step=100) == "step 100/100  held-out loss 2.5000\n"
    )


def test_only_rank_0_speaks(tmp_path, capsys):
    assert lines(tmp_path, capsys, {"loss": 1.0}, global_step=1, is_world_process_zero=False) == ""


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard's own thread
def test_a_disk_that_takes_no_more_curves_is_told_once_and_ends_nothing(tmp_path, caplog):
    args, state = TrainingArguments(str(tmp_path), report_to="none"), TrainerState(max_steps=9)
    control = TrainerControl()
    with mounted(tmp_path / "disk", "64k") as disk:
        curves = Curves(disk / "runs")
        curves.on_train_begin(args, state, control)
        curves.on_log(args, state, control, logs={"loss": 1.0})
        assert not caplog.text
        with suppress(OSError), open(disk / "other", "wb") as file:
            file.write(bytes(2**17))
        for step in range(200):
            state.global_step = step
            curves.on_log(args, state, control, logs={f"loss {n}": 1.0 for n in range(20)})
        curves.on_train_end(args, state, control)
    assert caplog.text.count("no more curves for TensorBoard (") == 1
    assert "No space left on device" in caplog.text
