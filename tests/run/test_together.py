"""A rank that fails while a run is prepared fails all ranks: none waits for it in a gather. Threads stand for ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from training import ranks
from training.errors import DataError, ModelError, OptionsError, TrainingError
from training.options.trainer_options import TrainingOptions
from training.ranks import together
from training.run import prepare

here = threading.local()


def on_two_ranks(function: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `function(rank)` returns or raises on each rank. A rank that waits for the other longer than 10 s fails."""
    meeting, values, outcomes = threading.Barrier(2), [None, None], [None, None]

    def gather(value: Any) -> list[Any]:
        values[here.rank] = value
        meeting.wait(timeout=10)
        gathered = list(values)
        meeting.wait(timeout=10)
        return gathered

    def run(rank: int) -> None:
        here.rank = rank
        try:
            outcomes[rank] = function(rank)
        except Exception as error:
            outcomes[rank] = error

    for module in (ranks, prepare):
        monkeypatch.setattr(module, "gather", gather)
    monkeypatch.setattr(ranks, "rank", lambda: here.rank)
    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def raising(error: Exception) -> Any:
    raise error


def test_every_rank_gets_its_own_result(monkeypatch):
    assert on_two_ranks(lambda rank: together(lambda: 10 * rank), monkeypatch) == [0, 10]


@pytest.mark.parametrize(
    ("error", "on_others", "message"),
    [
        (OptionsError("--lr -1 is negative", "--epochs 0 is too few"), OptionsError, "--lr -1 is negative"),
        (DataError("row 3 is empty"), OptionsError, "row 3 is empty"),
        (ModelError("no config.json"), OptionsError, "no config.json"),
        (OSError("Stale file handle"), TrainingError, "rank 1 failed: OSError: Stale file handle"),
    ],
)
def test_one_rank_that_fails_fails_the_other_with_its_message(error, on_others, message, monkeypatch):
    other, failed = on_two_ranks(
        lambda rank: together(lambda: raising(error) if rank == 1 else None), monkeypatch
    )
    assert failed is error
    assert type(other) is on_others
    assert message in str(other)


def test_a_rank_that_cannot_read_the_config_is_not_missing_in_the_gather_of_the_packing_proof(monkeypatch):
    error = ModelError("the config cannot be read")
    monkeypatch.setattr(prepare, "load_config", lambda *args: raising(error) if here.rank == 1 else object())
    options = TrainingOptions(local_output_dir="x", input_model="base")
    other, failed = on_two_ranks(lambda rank: prepare.agreed_packing(options, None), monkeypatch)
    assert failed is error
    assert isinstance(other, OptionsError)
    assert other.problems == ["the config cannot be read"]
