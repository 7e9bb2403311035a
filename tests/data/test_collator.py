"""The collators, on literal tensors that can be checked by eye."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.consts import IGNORE_INDEX
from training.data.batching import Documents, document_lengths
from training.data.collator import (
    DataCollatorForCompletionOnlyLM,
    DataCollatorForPackedRows,
    split_packed_batch,
)

PAD = 0
THREE_ROWS = [
    {"input_ids": [11, 12, 13, 14, 15], "response_spans": [[3, 5]]},
    {"input_ids": [21, 22, 23], "response_spans": [[2, 3]]},
    {"input_ids": [31, 32, 33, 34], "response_spans": [[1, 2], [3, 4]]},
]

padded = DataCollatorForCompletionOnlyLM(pad_token_id=PAD)
packed = DataCollatorForPackedRows(pad_token_id=PAD)


def pairs(edges: list[int]) -> list[list[int]]:
    """Spans between the sorted edges, two by two: [7, 1, 4, 2]  ->  [[1, 2], [4, 7]]"""
    edges = sorted(edges)
    return [list(pair) for pair in zip(edges[::2], edges[1::2], strict=False)]


row_lists = st.lists(
    st.integers(2, 30).flatmap(
        lambda n: st.fixed_dictionaries(
            {
                "input_ids": st.lists(st.integers(0, 5), min_size=n, max_size=n),
                "response_spans": st.lists(st.integers(1, n), min_size=2, max_size=6, unique=True).map(pairs),
            }
        )
    ),
    min_size=1,
    max_size=6,
)


def test_the_padded_batch_is_the_one_in_the_docstring() -> None:
    batch = padded(THREE_ROWS)
    assert batch["input_ids"].tolist() == [
        [11, 12, 13, 14, 15, 0, 0, 0],
        [21, 22, 23, 0, 0, 0, 0, 0],
        [31, 32, 33, 34, 0, 0, 0, 0],
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
    ]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, 14, 15, -100, -100, -100],
        [-100, -100, 23, -100, -100, -100, -100, -100],
        [-100, 32, -100, 34, -100, -100, -100, -100],
    ]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_the_packed_batch_is_the_one_in_the_docstring() -> None:
    batch = packed(THREE_ROWS)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 14, 15, 21, 22, 23, 31, 32, 33, 34]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 14, 15, -100, -100, 23, -100, 32, -100, 34]]
    assert batch["logits_to_keep"].tolist() == [2, 3, 6, 8, 10]
    assert batch["shift_labels"].tolist() == [[14, 15, 23, 32, 34]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 8, 12]
    assert batch["documents"] == Documents(lengths=(5, 3, 4), labels=(2, 1, 2))
    assert {name: value.dtype for name, value in batch.items() if name != "documents"} == {
        "input_ids": torch.int64, "position_ids": torch.int64, "labels": torch.int64,
        "logits_to_keep": torch.int64, "shift_labels": torch.int64, "cu_seq_lens_q": torch.int32,
    }  # fmt: skip


def test_a_pad_token_inside_the_text_is_attended_to_and_has_a_label() -> None:
    row = {"input_ids": [PAD, 12, PAD, 14, PAD], "response_spans": [[2, 5]]}
    batch = padded([row])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, PAD, 14, PAD, -100, -100, -100]]
    row = {"input_ids": list(range(1, 9)), "response_spans": [[4, 8]]}
    assert padded([row])["attention_mask"].tolist() == [[1] * 8]


def test_the_first_token_of_a_row_is_never_a_target() -> None:
    rows = [
        {"input_ids": [11, 12], "response_spans": [[1, 2]]},
        {"input_ids": [21, 22], "response_spans": [[0, 2]]},
    ]
    assert packed(rows)["labels"].tolist() == [[-100, 12, -100, 22]]
    assert padded(rows)["labels"][:, :2].tolist() == [[-100, 12], [-100, 22]]


def test_an_empty_share_becomes_one_token_without_a_loss() -> None:
    batch = padded([])
    assert batch["input_ids"].shape == (1, 8)
    assert batch["attention_mask"].tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]]
    assert (batch["labels"] == IGNORE_INDEX).all()
    batch = packed([])
    assert batch["input_ids"].tolist() == [[PAD]]
    assert batch["position_ids"].tolist() == [[0]]
    assert batch["labels"].tolist() == [[-100]]
    assert batch["logits_to_keep"].shape == (0,)
    assert batch["shift_labels"].shape == (1, 0)
    assert batch["cu_seq_lens_q"].tolist() == [0, 1]
    assert batch["documents"] == Documents(lengths=(1,), labels=(0,))


def test_a_packed_batch_is_split_by_rows_and_an_empty_part_has_no_loss() -> None:
    first, second = split_packed_batch(packed(THREE_ROWS), 2)
    assert first["input_ids"].tolist() == [[31, 32, 33, 34, 21, 22, 23]]
    assert first["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert first["logits_to_keep"].tolist() == [0, 2, 5]
    assert first["shift_labels"].tolist() == [[32, 34, 23]]
    assert first["cu_seq_lens_q"].tolist() == [0, 4, 7]
    assert first["documents"] == Documents(lengths=(4, 3), labels=(2, 1))
    assert second["input_ids"].tolist() == [[11, 12, 13, 14, 15]]
    assert second["shift_labels"].tolist() == [[14, 15]]
    *_, empty = split_packed_batch(packed(THREE_ROWS), 4)
    assert empty["input_ids"].tolist() == [[11]]
    assert empty["labels"].tolist() == [[-100]]
    assert empty["logits_to_keep"].shape == (0,)
    assert empty["documents"] == Documents(lengths=(1,), labels=(0,))


@settings(deadline=None)  # a busy machine is slow
@given(row_lists, st.integers(1, 7))
def test_a_part_is_the_packed_batch_of_its_rows(rows: list[dict], micro_steps: int) -> None:
    """Rows are recognised by their tokens: each row's are its own number."""
    for number, row in enumerate(rows):
        row["input_ids"] = [number] * len(row["input_ids"])
    for part in split_packed_batch(packed(rows), micro_steps):
        numbers = [part["input_ids"][0, start].item() for start in part["cu_seq_lens_q"][:-1]]
        if part["documents"].labels == (0,):  # a part without rows
            assert part["input_ids"].tolist() == [[rows[0]["input_ids"][0]]]
            continue
        expected = packed([rows[number] for number in numbers])
        assert part.keys() == expected.keys()
        assert part["documents"] == expected["documents"]
        assert all(torch.equal(part[name], expected[name]) for name in part.keys() - {"documents"})


@settings(deadline=None)
@given(row_lists)
def test_the_lengths_on_the_host_are_those_of_the_positions(rows: list[dict]) -> None:
    batch = packed(rows)
    assert list(batch["documents"].lengths) == document_lengths(batch["position_ids"])
    assert batch["cu_seq_lens_q"].diff().tolist() == document_lengths(batch["position_ids"])
    assert sum(batch["documents"].labels) == batch["shift_labels"].numel()


@settings(deadline=None)  # a busy machine is slow
@given(row_lists)
def test_both_collators_give_the_same_labels_to_the_same_tokens(rows: list[dict]) -> None:
    wide, flat = padded(rows), packed(rows)
    real = wide["attention_mask"].bool()
    assert wide["input_ids"][real].tolist() == flat["input_ids"][0].tolist()
    assert wide["labels"][real].tolist() == flat["labels"][0].tolist()
    # transformers.Trainer divides the loss by the number of `shift_labels` if present, else of `labels[..., 1:]`.
    assert (wide["labels"][:, 1:] != IGNORE_INDEX).sum() == (flat["shift_labels"] != IGNORE_INDEX).sum()
    assert (flat["labels"][0, flat["logits_to_keep"] + 1] == flat["shift_labels"][0]).all()
