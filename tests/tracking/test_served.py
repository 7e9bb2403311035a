"""MLflow's `predict` with earlier turns, through its own checks of the signature and as a serving endpoint gets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from training.consts import GREEDY
from training.errors import DataError
from training.model.generation import generate_response
from training.tracking.mlflow_model import signature
from training.tracking.served import Served

mlflow = pytest.importorskip("mlflow")

SYSTEM = {"role": "system", "content": "Answer in one word."}
RIVER = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Rhine"}]
GREEDY_PARAMS = {"temperature": 0.0, "max_new_tokens": 9}


@pytest.fixture(scope="module")
def loaded(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder as MLflow loads it, with the signature that a finished run logs."""
    path = tmp_path_factory.mktemp("logged") / "model"
    mlflow.pyfunc.save_model(
        path,
        loader_module="training.tracking.served",
        data_path=str(random_folder),
        signature=signature(),
        pip_requirements=[],
    )
    return mlflow.pyfunc.load_model(str(path))


@pytest.fixture(scope="module")
def expected(loaded: Any) -> dict[str, str]:
    """The answer to "And now?" after each history."""
    served: Served = loaded._model_impl
    ask: dict[str, Any] = {
        "model": served.model,
        "tokenizer": served.tokenizer,
        "max_new_tokens": 9,
        **GREEDY,
    }
    histories: dict[str, list[Any]] = {"none": [], "river": RIVER, "system": [SYSTEM, *RIVER]}
    answers = {
        name: generate_response("And now?", history=history, **ask) for name, history in histories.items()
    }
    assert len(set(answers.values())) == 3
    return answers


@pytest.mark.parametrize("as_text", [False, True], ids=["lists", "JSON text"])
def test_predict_answers_after_the_history_of_each_row(
    loaded: Any, expected: dict[str, str], as_text: bool
) -> None:
    histories: list[Any] = [None, [SYSTEM, *RIVER], RIVER, []]
    if as_text:
        histories = [history and json.dumps(history) for history in histories]
        histories[3] = ""
    table = pandas.DataFrame({"instruction": ["And now?"] * 4, "history": histories}, index=[7, 3, 5, 1])
    answers = loaded.predict(table, params=GREEDY_PARAMS)["response"]
    assert answers.tolist() == [expected[name] for name in ("none", "system", "river", "none")]
    assert answers.index.tolist() == [7, 3, 5, 1]


def test_callers_without_a_history_send_what_they_sent_before(loaded: Any, expected: dict[str, str]) -> None:
    table = pandas.DataFrame({"instruction": ["And now?"]})
    for data in (
        table,
        table.assign(input=None),
        table.assign(history=float("nan")),
        {"instruction": "And now?"},
    ):
        assert loaded.predict(data, params=GREEDY_PARAMS)["response"].tolist() == [expected["none"]]


def test_a_dict_of_columns_gives_one_answer_for_each_row(loaded: Any, expected: dict[str, str]) -> None:
    """MLflow puts the columns into one row if all of their values are text."""
    ask = {"instruction": ["And now?", "And now?"]}
    texts, both = ["", json.dumps(RIVER)], [expected["none"], expected["river"]]
    for data, answers in (
        (ask, [expected["none"]] * 2),
        (ask | {"input": ["", ""]}, [expected["none"]] * 2),
        (ask | {"history": texts}, both),
        (ask | {"history": [None, RIVER]}, both),
    ):
        assert loaded.predict(data, params=GREEDY_PARAMS)["response"].tolist() == answers


def test_arrays_as_spark_passes_them_are_histories(loaded: Any, expected: dict[str, str]) -> None:
    arrays = [
        np.array(RIVER, dtype=object),
        np.empty(0, dtype=object),
        np.array([["Name a river.", "The Rhine"]]),
    ]
    table = pandas.DataFrame({"instruction": ["And now?"] * 3, "history": arrays})
    answers = loaded.predict(table, params=GREEDY_PARAMS)["response"].tolist()
    assert answers == [expected["river"], expected["none"], expected["river"]]


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_records": [{"instruction": "And now?", "history": RIVER}, {"instruction": "And now?"}]},
        {"dataframe_split": {"columns": ["instruction", "history"], "data": [["And now?", RIVER], ["And now?", None]]}},
        {"dataframe_records": [{"instruction": "And now?", "history": json.dumps(RIVER)}, {"instruction": "And now?"}]},
        {"inputs": {"instruction": ["And now?"] * 2, "history": [RIVER, []]}},
        {"inputs": [{"instruction": "And now?", "history": RIVER}, {"instruction": "And now?", "history": []}]},
        # MLflow turns the columns of `instances` into arrays, so lists of different lengths must be text.
        {"instances": [{"instruction": "And now?", "history": text} for text in (json.dumps(RIVER), "")]},
    ],
    ids=["records", "split", "records with JSON text", "inputs by column", "inputs by row", "instances"],
)  # fmt: skip
def test_a_serving_endpoint_takes_histories_in_each_form_of_json(
    loaded: Any, expected: dict[str, str], body: dict[str, Any]
) -> None:
    from mlflow.pyfunc.scoring_server import invocations

    request = json.dumps(body | {"params": GREEDY_PARAMS})
    reply = invocations(request, "application/json", loaded, loaded.metadata.get_input_schema())
    assert reply.status == 200
    responses = [row["response"] for row in json.loads(reply.response)["predictions"]]
    assert responses == [expected["river"], expected["none"]]


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([{"role": "judge", "content": "a"}], "row 2: history, turn 1: the role is 'judge'"),
        (RIVER[:1], "row 2: history, turn 1: the last question has no answer"),
        ("[{", "row 2: history is not JSON"),
        ("7", "row 2: history is int 7, expected a list of messages such as"),
        ({"role": "user"}, "row 2: history is dict .*, expected a list of messages such as"),
    ],
)
def test_a_history_that_cannot_be_used_is_refused_with_its_row(loaded: Any, history: Any, words: str) -> None:
    table = pandas.DataFrame({"instruction": ["a", "b"], "history": [None, history]})
    with pytest.raises(DataError, match=words):
        loaded.predict(table)


def test_the_signature_says_which_columns_are_optional() -> None:
    inputs = {
        column["name"]: (column["type"], column["required"])
        for column in json.loads(signature().to_dict()["inputs"])
    }
    assert inputs == {"instruction": ("string", True), "input": ("string", False), "history": ("any", False)}
