"""Finds the files of a dataset in a folder, as Spark, pandas and `datasets` write them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from training.data.table import kind_of
from training.errors import DataError

DATASETS_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
TRAIN = "train"
# A word of a file's name, as in test-00000-of-00001.parquet. These rows are kept for tests.
TEST_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class Parts:
    """The files of a folder that are one dataset, in the order of their names, and the names of others."""

    files: list[Path]
    not_read: list[str]


def is_saved_dataset(folder: Path) -> bool:
    """Whether save_to_disk of `datasets` wrote the folder, a Dataset or a DatasetDict."""
    state = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return state or (folder / "dataset_dict.json").is_file()


def parts_of(folder: Path, kinds: Collection[str]) -> Parts:
    """The data files of a folder. Names that begin with _ or . are left out, as by Spark.

    Files of the split train are read if others are of a split such as test. Raises DataError if the files are of
    several kinds or splits, if there are none, or if more are in folders inside.
    """
    if (folder / "_delta_log").is_dir():
        raise DataError(
            f"{folder}: is a Delta table, whose files also hold rows that were deleted. Write its rows with "
            "spark.read.format('delta').load(...).write.parquet(...), and name that folder"
        )
    files, inner = _entries(folder)
    data = [file for file in files if kind_of(file) in kinds and file.name not in DATASETS_METADATA]
    others = [file for file in files if kind_of(file) not in kinds]
    with_data = [part for part in inner if any(kind_of(file) in kinds for file in part.iterdir())]
    if with_data:
        names = ", ".join(part.name for part in with_data[:5])
        raise DataError(
            f"{folder}: has data files in folders inside ({names}). Name one folder, whose files are one dataset"
        )
    if not data:
        raise DataError(f"{folder}: a folder without data files. Expected {', '.join(kinds)}")
    chosen = _train_split(folder, data)
    suffixes = sorted({_whole_suffix(file) for file in chosen})
    if len(suffixes) > 1:
        raise DataError(
            f"{folder}: has files of several kinds ({', '.join(suffixes)}), which may hold the same rows. "
            "Name one file, or a folder with files of one kind"
        )
    unread = [file for file in data if file not in chosen] + others
    return Parts(chosen, [str(file.relative_to(folder)) for file in sorted(unread)])


def _entries(folder: Path, above: Collection[Path] = ()) -> tuple[list[Path], list[Path]]:
    """(files, folders) in order of name. Folders that Spark names column=value are opened."""
    files: list[Path] = []
    inner: list[Path] = []
    around = (*above, folder.resolve())
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.startswith(("_", ".")):
            continue
        if not entry.is_dir():
            files.append(entry)
        elif "=" in entry.name:
            if entry.resolve() in around:
                raise DataError(f"{entry}: is a link to a folder that it is in. Remove it")
            more_files, more_inner = _entries(entry, around)
            files, inner = files + more_files, inner + more_inner
        else:
            inner.append(entry)
    return files, inner


def _train_split(folder: Path, files: list[Path]) -> list[Path]:
    """The files of the split train if the names tell splits apart, else all files."""
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    names = set(splits.values())
    if len(names) == 1 or names.isdisjoint(TEST_SPLITS):
        return files
    if TRAIN not in names:
        found = ", ".join(file.name for file in files[:5])
        raise DataError(
            f"{folder}: has files of a split for tests, and none of the split train ({found}). "
            "Name the file that you want to train on"
        )
    return [file for file, split in splits.items() if split == TRAIN]


def _split_of(file: Path) -> str:
    """The split that a word of a name says: "test" for test-00000-of-00001.parquet and alpaca_test.json.

    Spark's partitionBy("split") says it in the name of a folder: split=test.
    """
    for part in file.parts[:-1]:
        if part.startswith("split=") and part[6:] in (TRAIN, *TEST_SPLITS):
            return part[6:]
    words = re.split(r"[^a-z]+", file.name.lower().split(".")[0])
    found = [word for word in words if word == TRAIN or word in TEST_SPLITS]
    return found[0] if found else ""


def _whole_suffix(file: Path) -> str:
    """Kind and compression: ".jsonl.gz"."""
    last = file.suffix.lower()
    return kind_of(file) + (last if last != kind_of(file) else "")
