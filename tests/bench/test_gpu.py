"""The check of a GPU: wrong numbers, crashes and hangs fail their line, and the others still run."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from tests.conftest import python
from training.bench import check_numerics, gpu, short_runs
from training.bench.lines import FAIL, NOT_APPLICABLE, PASS, Setup
from training.bench.processes import Budget, Group, Line, run_group
from training.model import attention

MODULE = "tests.bench.lines_that_fail"
TINY = Setup("cpu", "bf16", folder="", results="", **gpu.TINY | {"seconds": 0.0})


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return replace(TINY, folder=str(tmp_path))


def group(*names: str, limit: float = 60) -> Group:
    return Group(MODULE, tuple(Line(name, name, limit) for name in names))


# --- processes ----------------------------------------------------------------------------------------


def test_a_line_that_fails_or_crashes_does_not_end_the_others(setup):
    names = ("good", "wrong", "error", "crash", "missing", "other_gpu")
    results = list(run_group(group(*names), setup, Budget(5)))
    assert [result.name for result in results] == list(names)
    assert [result.status for result in results] == [PASS, FAIL, FAIL, FAIL, NOT_APPLICABLE, NOT_APPLICABLE]
    texts = [result.text for result in results]
    assert texts[2] == "ValueError: no such number"
    assert texts[3] == "its process ended with exit code 3. Its last words: the last words"
    assert texts[4] == "the package no_such_package is not installed"


def test_a_line_that_hangs_is_stopped_says_where_and_the_next_one_runs(setup):
    begin = time.monotonic()
    hung, good = run_group(Group(MODULE, (Line("hang", "", 3), Line("good", "", 60))), setup, Budget(5))
    assert (hung.status, hung.text) == (FAIL, "hangs: no answer within 3 s")
    assert any("in hang" in line for line in hung.figures["log"])
    assert good.status == PASS
    assert time.monotonic() - begin < 60


def test_lines_without_time_fail(setup):
    budget = Budget(0.05)
    running, not_begun = run_group(group("hang", "good"), setup, budget)
    assert running.text.startswith("stopped after")
    assert "the time was used up. Give it more with --minutes" in running.text
    assert not_begun.text.startswith("not run: the time was used up")
    assert running.status == not_begun.status == FAIL


# --- the command --------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, file: Path, *names: str) -> Result:
    monkeypatch.setattr(gpu, "GROUPS", (group(*names),))
    monkeypatch.setattr(gpu, "NAMES", list(names))
    monkeypatch.setattr(gpu, "NUMERICS", MODULE)
    return CliRunner().invoke(gpu.main, ["--json", str(file)])


def test_the_exit_code_the_table_and_the_json_say_what_failed(monkeypatch, tmp_path):
    file = tmp_path / "check.json"
    result = command(monkeypatch, file, "good", "wrong", "other_gpu")
    assert result.exit_code == 1
    assert "| good | pass | one \\| two |" in result.stdout
    assert "| wrong | fail | two instead of one |" in result.stdout
    assert "2 pass, 1 fail, 1 not applicable" in result.stdout
    assert f"torch {torch.__version__}" in result.stdout
    written = json.loads(file.read_text())
    assert [line["status"] for line in written["results"]] == [PASS, PASS, FAIL, NOT_APPLICABLE]
    assert written["results"][1]["figures"] == {"figure": 1.0}
    assert command(monkeypatch, file, "good").exit_code == 0


def test_a_json_file_that_cannot_be_written_is_refused_before_anything_is_checked(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "check", lambda *_: pytest.fail("it checks"))
    for file, reason in ((tmp_path / "none" / "check.json", "cannot be written"), (tmp_path, "is a folder")):
        result = command(monkeypatch, file, "good")
        assert result.exit_code == 2
        assert f"{file}: {reason}" in result.output


def test_other_versions_are_refused_unless_they_are_allowed(monkeypatch):
    monkeypatch.setattr(gpu, "version_problems", lambda: ["Wrong package versions: torch 2.11.0"])
    result = CliRunner().invoke(gpu.main, [])
    assert result.exit_code == 2
    assert "Wrong package versions: torch 2.11.0. Or type --any-versions" in result.output


def test_as_many_layers_are_used_as_the_plan_says_fit():
    setup = Setup("cuda", "bf16", 1, folder="", results="", **gpu.REAL)
    assert short_runs.layers_that_fit(setup, 139.0) == 28
    layers = short_runs.layers_that_fit(setup, 79.0)
    assert 10 < layers < 28
    alone = short_runs.settings_of(setup, None)
    zero3 = short_runs.settings_of(setup, "config/ds_z3_bf16_config.json")
    needs = [
        max(sum(short_runs.planned_gib(setup, s, n).values()) for s in (alone, zero3)) for n in (layers, 28)
    ]
    assert needs[0] <= 79.0 < needs[1]
    assert short_runs.layers_that_fit(setup, 1.0) == 1


# --- wrong numbers ------------------------------------------------------------------------------------


def attends_to_all(query, key, value, lengths, dropout=0.0):
    """Causal attention that ignores where documents begin."""
    heads = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)


def without_gradient_of_value(query, key, value, lengths, dropout=0.0):
    return attention.attend_document_by_document(query, key, value.detach(), lengths) + 0 * value


@pytest.mark.parametrize("wrong", [attends_to_all, without_gradient_of_value])
def test_a_wrong_attention_or_a_wrong_gradient_fails_its_line(setup, monkeypatch, wrong):
    assert check_numerics.attention_loop(setup).good
    monkeypatch.setattr(check_numerics, "attend_document_by_document", wrong)
    assert not check_numerics.attention_loop(setup).good


def test_attention_in_one_call_is_compared_with_the_loop(setup, monkeypatch):
    def one_call(query, key, value, offsets, longest):
        lengths = offsets.diff().tolist()
        assert longest == max(lengths)
        return attention.attend_document_by_document(query, key, value, lengths)

    def noisy(query, key, value, offsets, longest):
        result = one_call(query, key, value, offsets, longest)
        return result + 0.01 * torch.randn(result.shape).to(result) * result.detach().std()

    monkeypatch.setattr(check_numerics, "varlen_obstacle", lambda *_: None)
    monkeypatch.setattr(check_numerics, "attend_in_one_call", one_call)
    assert check_numerics.attention_in_one_call(setup).good
    monkeypatch.setattr(check_numerics, "attend_in_one_call", noisy)
    assert not check_numerics.attention_in_one_call(setup).good


def test_documents_that_attend_to_each_other_fail_on_the_device(setup, monkeypatch):
    assert check_numerics.packing_leak(setup).good
    monkeypatch.setattr(attention, "attend_document_by_document", attends_to_all)
    leaking = check_numerics.packing_leak(setup)
    assert not leaking.good
    assert leaking.figures["leak"] > 0
    assert leaking.figures["gradient"] > 0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "wrong",
    [lambda loss: 1.01 * loss, lambda loss: loss.detach() + 1.05 * (loss - loss.detach())],
    ids=["value", "gradient"],
)
def test_a_wrong_loss_or_gradient_of_the_loss_fails_its_line(setup, monkeypatch, precision, wrong):
    check, right = check_numerics.loss_in(precision), check_numerics._chunked_loss
    assert check(setup).good
    monkeypatch.setattr(check_numerics, "_chunked_loss", lambda *inputs: wrong(right(*inputs)))
    assert not check(setup).good


@pytest.mark.slow  # three processes import torch
def test_the_command_checks_a_cpu(tmp_path):
    file = tmp_path / "check.json"
    names = ("loop", "varlen", "leak", "loss-fp16", "loss-bf16", "zero3")
    chosen = [word for name in names for word in ("--only", name)]
    result = python("-m", "training.bench.gpu", "--json", file, "--minutes", "20", *chosen)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = {line["name"]: line for line in json.loads(file.read_text())["results"]}
    assert list(lines) == ["machine", *names]
    assert {name for name, line in lines.items() if line["status"] != PASS} == {"varlen"}
    assert lines["varlen"]["status"] == NOT_APPLICABLE
    assert lines["zero3"]["figures"]["tokens_per_second"] > 0
    assert "| a step: ZeRO-3 | pass |" in result.stdout
    assert "6 pass, 0 fail, 1 not applicable" in result.stdout
