"""Global batches do not depend on the ranks, and their shares cover every row once and are balanced."""

from __future__ import annotations

import json
import sys
import time
import tracemalloc
from itertools import chain, islice, product
from pathlib import Path

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import GPTJForCausalLM, Trainer, TrainerState, TrainingArguments

from training.data.batching import (
    GlobalBatchSampler,
    check_token_budget,
    deal_by_tokens,
    deal_in_order,
    held_out_batches,
    micro_steps_needed,
)
from training.data.collator import DataCollatorForPackedRows
from training.run.resume import RestoreOnResume

lengths_of_rows = st.lists(st.integers(1, 600), min_size=1, max_size=200)
world_sizes = st.sampled_from([1, 2, 3, 8])
deals = st.sampled_from(["packed", "padded", "length"])


def sampler(lengths: list[int], rank: int = 0, **changes) -> GlobalBatchSampler:
    defaults = {"global_batch_size": 24, "world_size": 1, "accumulation": 1, "seed": 42, "deal": "packed"}
    return GlobalBatchSampler(lengths, rank=rank, **(defaults | changes))


def test_the_examples_in_the_docstrings_are_correct() -> None:
    assert deal_by_tokens([90, 20, 60, 50, 40], 2) == [[0, 4], [2, 3, 1]]
    assert deal_by_tokens([10], 3) == [[0], [], []]
    assert deal_in_order(7, 3) == [[0, 1, 2], [3, 4], [5, 6]]
    assert deal_in_order(2, 3) == [[0], [1], []]
    assert held_out_batches([10, 80, 20, 70, 30, 60], rows=2, world_size=2) == [[[1, 4], [3, 5]], [[2], [0]]]


def test_padded_batches_are_dealt_in_order_to_accumulation_steps_and_ranks() -> None:
    plain = sampler([1] * 8, global_batch_size=8, world_size=2, accumulation=2, deal="padded")
    order = torch.randperm(8, generator=torch.Generator().manual_seed(42)).tolist()
    assert plain.micro_batches(order) == [[order[0:2], order[2:4]], [order[4:6], order[6:8]]]


@settings(deadline=None)  # a busy machine is slow
@given(lengths_of_rows, st.integers(0, 2), deals)
def test_global_batches_have_every_row_once_and_are_the_same_for_1_2_3_and_8_ranks(
    lengths: list[int], epoch: int, deal: str
) -> None:
    def global_batches(world_size: int, accumulation: int) -> list[list[int]]:
        """The rows of each optimizer step, gathered from all ranks."""
        steps: list[list[int]] = [[] for _ in range(-(-len(lengths) // 24))]
        for rank in range(world_size):
            mine = sampler(lengths, rank, world_size=world_size, accumulation=accumulation, deal=deal)
            mine.set_epoch(epoch)
            shares = list(mine)
            assert len(shares) == len(mine) == accumulation * len(steps)  # the same on all ranks
            for i, share in enumerate(shares):
                steps[i // accumulation] += share
        return [sorted(step) for step in steps]

    expected = global_batches(1, 1)
    assert [len(batch) for batch in expected[:-1]] == [24] * (len(expected) - 1)
    assert sorted(chain.from_iterable(expected)) == list(range(len(lengths)))
    for world_size, accumulation in product((1, 2, 3, 8), (1, 2, 3)):
        assert global_batches(world_size, accumulation) == expected


def test_dealing_by_length_at_least_halves_dollys_padding(alpaca_lengths: list[int]) -> None:
    def padding(deal: str) -> int:
        mine = sampler(alpaca_lengths, global_batch_size=64, world_size=8, deal=deal)
        shares = [share for batch in mine.global_batches() for share in mine.micro_batches(batch)[0]]
        return sum(len(share) * max(alpaca_lengths[i] for i in share) for share in shares) - sum(
            alpaca_lengths
        )

    assert padding("length") < padding("padded") / 2


def test_epochs_and_seeds_give_different_but_repeatable_orders() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        mine = sampler([5] * 100, seed=seed)
        mine.set_epoch(epoch)
        return list(mine.global_batches())

    assert order(42, 0) == order(42, 0)
    assert order(42, 0) != order(42, 1)
    assert order(42, 0) != order(7, 0)


@settings(deadline=None)  # a busy machine is slow
@given(lengths_of_rows, st.integers(1, 16))
def test_shares_by_tokens_have_every_row_and_differ_by_at_most_one_row(
    lengths: list[int], shares: int
) -> None:
    dealt = deal_by_tokens(lengths, shares)
    tokens = [sum(lengths[i] for i in share) for share in dealt]
    assert len(dealt) == shares
    assert sorted(chain.from_iterable(dealt)) == list(range(len(lengths)))
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] - tokens[-1] <= max(lengths)


def test_on_real_rows_the_largest_of_8_shares_is_within_1_percent_of_the_mean(
    alpaca_lengths: list[int],
) -> None:
    mine = sampler(alpaca_lengths, global_batch_size=64, world_size=8)
    ratios = []
    for batch in mine.global_batches():
        (shares,) = mine.micro_batches(batch)
        tokens = [sum(alpaca_lengths[i] for i in share) for share in shares]
        ratios.append(max(tokens) * 8 / sum(tokens))
    assert sum(ratios) / len(ratios) <= 1.01


def test_dealing_500_000_rows_takes_less_than_3_seconds_and_200_mb(alpaca_lengths: list[int]) -> None:
    lengths = (alpaca_lengths * 400)[:500_000]
    trace = sys.gettrace()  # of coverage, which makes it three times as slow
    sys.settrace(None)
    start = time.process_time()
    shares = list(sampler(lengths, global_batch_size=64, world_size=8))
    seconds = time.process_time() - start
    sys.settrace(trace)
    assert seconds < 3
    assert len(shares) == 7813
    tracemalloc.start()  # tracing is slow, so only for the first shares; the rest reuse the same memory
    for _ in islice(sampler(lengths, global_batch_size=64, world_size=8), 100):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


@settings(deadline=None)  # a busy machine is slow
@given(lengths_of_rows, st.integers(1, 8), world_sizes)
def test_held_out_rows_are_evaluated_once_with_the_same_number_of_steps_on_every_rank(
    lengths: list[int], rows: int, world_size: int
) -> None:
    steps = held_out_batches(lengths, rows, world_size)
    assert sorted(chain.from_iterable(chain.from_iterable(steps))) == list(range(len(lengths)))
    assert len(steps) == -(-len(lengths) // (rows * world_size))
    for batches in steps:
        assert len(batches) == world_size
        assert max(map(len, batches)) <= rows
        assert max(map(len, batches)) - min(map(len, batches)) <= 1


@settings(deadline=None)  # a busy machine is slow
@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(0, 3)), max_size=60), st.integers(1, 8), world_sizes
)
def test_a_step_of_an_evaluation_has_rows_of_one_source_and_a_first_batch_that_is_not_empty(
    rows: list[tuple[int, int]], size: int, world_size: int
) -> None:
    lengths, sources = [length for length, _ in rows], [source for _, source in rows]
    steps = held_out_batches(lengths, size, world_size, sources)
    assert sorted(chain.from_iterable(chain.from_iterable(steps))) == list(range(len(rows)))
    assert all(len(batches) == world_size and max(map(len, batches)) <= size for batches in steps)
    for batches in steps:
        assert {sources[row] for batch in batches for row in batch} == {sources[batches[0][0]]}
    assert [lengths[batches[0][0]] for batches in steps] == sorted(
        (lengths[batches[0][0]] for batches in steps), reverse=True
    )
    assert held_out_batches(lengths, size, world_size, [0] * len(rows)) == held_out_batches(
        lengths, size, world_size
    )


@settings(deadline=None)  # a busy machine is slow
@given(st.lists(st.integers(1, 100), max_size=30), st.integers(100, 400))
def test_micro_steps_keep_to_the_token_budget(lengths: list[int], max_tokens: int) -> None:
    needed = micro_steps_needed(lengths, max_tokens)
    assert 1 <= needed <= max(1, len(lengths))
    for steps in (needed, needed + 1, needed + 3):  # other ranks may need more
        parts = deal_by_tokens(lengths, steps)
        assert len(parts) == steps
        assert max(sum(lengths[i] for i in part) for part in parts) <= max_tokens


def test_a_row_longer_than_the_token_budget_is_refused_with_what_to_type() -> None:
    message = (
        r"--max-tokens-per-device 500 is less than the length of 2 of 4 rows \(612, 600 tokens\), "
        r"and a row cannot be split\. Type --max-tokens-per-device 612 or more\."
    )
    with pytest.raises(ValueError, match=message):
        check_token_budget([100, 600, 612, 500], 500)
    with pytest.raises(ValueError, match=message):
        micro_steps_needed([100, 600, 612, 500], 500)
    check_token_budget([100, 600, 612, 500], 612)


@pytest.mark.parametrize("deal", ["packed", "length"])
def test_the_shares_of_a_step_on_all_ranks_are_those_that_the_ranks_iterate(deal: str) -> None:
    lengths = [3 + i % 7 for i in range(61)]  # 4 global batches, the last of 13 rows
    options = {"global_batch_size": 16, "world_size": 2, "accumulation": 2, "deal": deal}
    iterated: list[list[list[list[int]]]] = []  # [rank][epoch][micro-step]
    for rank in range(2):
        mine = sampler(lengths, rank, **options)
        epochs = []
        for epoch in range(2):
            mine.set_epoch(epoch)
            epochs.append(list(mine))
        iterated.append(epochs)
    planner = sampler(lengths, 0, **options)
    for step in (5, 0, 7, 3, 4):  # in any order
        epoch, within = divmod(step, 4)
        shares = planner.shares_of_step(step)
        assert shares == [
            [iterated[rank][epoch][2 * within + micro_step] for rank in range(2)] for micro_step in range(2)
        ]


def test_the_trainer_accepts_the_sampler_and_sets_its_epoch(tmp_path: Path, base_folder: Path) -> None:
    lengths = [3 + i % 7 for i in range(21)]
    rows = Dataset.from_list(
        [{"input_ids": [i] * n, "response_spans": [[1, n]]} for i, n in enumerate(lengths)]
    )
    batches: list[list[int]] = []

    class Recorder(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return sampler(lengths, global_batch_size=8, accumulation=2)

        def training_step(self, model, inputs, num_items_in_batch=None):
            batches.append(sorted(set(inputs["input_ids"][0].tolist())))
            return super().training_step(model, inputs, num_items_in_batch)

    arguments = TrainingArguments(
        tmp_path, use_cpu=True, max_steps=6, gradient_accumulation_steps=2, save_strategy="no", report_to=[],
        remove_unused_columns=False, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    model, collator = GPTJForCausalLM.from_pretrained(base_folder), DataCollatorForPackedRows(0)
    Recorder(model, arguments, train_dataset=rows, data_collator=collator).train()
    assert len(batches) == 12  # two epochs of 8 + 8 + 5 rows, two micro batches each
    for epoch in (batches[:6], batches[6:]):
        assert sorted(chain.from_iterable(epoch)) == list(range(21))
    assert batches[:6] != batches[6:]


@pytest.fixture(scope="module")
def alpaca_lengths() -> list[int]:
    """Tokens of 1,500 real rows under the GPT-2 BPE (`tests/alpaca_lengths.json`)."""
    return json.loads((Path(__file__).parents[1] / "alpaca_lengths.json").read_text())


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("done", [1, 4, 8, 9])  # global batches; an epoch has 4
def test_a_resume_on_any_number_of_ranks_continues_in_the_order_of_its_epoch(
    tmp_path: Path, world_size: int, done: int
) -> None:
    """With the loaders that accelerate builds, and both places where the Trainer sets the epoch."""
    lengths, accumulation = [3 + i % 7 for i in range(61)], 2
    options = {"global_batch_size": 16, "world_size": world_size, "accumulation": accumulation}
    epoch, within = divmod(done, 4)
    for rank in range(world_size):
        mine, undisturbed = sampler(lengths, rank, **options), sampler(lengths, rank, **options)
        loader = prepare_data_loader(
            DataLoader(range(len(lengths)), batch_sampler=mine, collate_fn=list),
            num_processes=world_size, process_index=rank, put_on_device=False,
        )  # fmt: skip
        if world_size > 1:  # as Trainer._get_dataloader does
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
        arguments = TrainingArguments(tmp_path, use_cpu=True, gradient_accumulation_steps=accumulation)
        state = TrainerState(global_step=done)
        RestoreOnResume(None, tmp_path).on_epoch_begin(arguments, state, None, train_dataloader=loader)
        if within:
            loader = skip_first_batches(loader, within * accumulation)
        loader.set_epoch(epoch)
        if hasattr(getattr(loader.batch_sampler, "batch_sampler", None), "set_epoch"):
            loader.batch_sampler.batch_sampler.set_epoch(epoch)
        undisturbed.set_epoch(epoch)
        assert list(loader) == list(undisturbed)[within * accumulation :]
