"""docs/platforms.md: the extras of pyproject.toml and what they bring, and the notebook for newcomers."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.test_docs import rows_of_table
from training.storage.record import read_run_record

ROOT = Path(__file__).parents[2]
DEMO_NOTEBOOK = ROOT / "notebooks" / "demo.ipynb"


def test_the_page_lists_every_extra_and_what_it_brings_and_the_tests_have_the_same_versions() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = rows_of_table("platforms", "extra | what it brings")
    assert {name.strip("`"): brings.split(", ") for name, brings, _ in rows} == {
        extra: [pin.split("==")[0] for pin in pins] for extra, pins in extras.items()
    }
    tested = (ROOT / "requirements_dev.txt").read_text().splitlines()
    for pins in extras.values():
        assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins)
        assert {pin for pin in pins if not pin.startswith("trl")} <= set(tested)


# --- the notebook for newcomers -----------------------------------------------------------------------


def test_the_demo_notebook_is_tracked_small_valid_and_without_outputs() -> None:
    nbformat.validate(nbformat.read(DEMO_NOTEBOOK, as_version=4))
    content = json.loads(DEMO_NOTEBOOK.read_text())
    assert content["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert DEMO_NOTEBOOK.stat().st_size < 10_000
    for cell in content["cells"]:
        assert cell["metadata"] == {}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    ignored = subprocess.run(["git", "check-ignore", "--quiet", DEMO_NOTEBOOK], cwd=ROOT)
    assert ignored.returncode != 0, "the file would not be committed"
    other = subprocess.run(["git", "check-ignore", "--quiet", "notebooks/executed.ipynb"], cwd=ROOT)
    assert other.returncode == (0 if (ROOT / ".git").exists() else 128)


@pytest.mark.slow
def test_the_demo_notebook_trains_shows_its_picture_and_answers(tmp_path: Path) -> None:
    opened = nbformat.read(DEMO_NOTEBOOK, as_version=4)
    copy = tmp_path / "repository" / "notebooks"  # the run's folder is in the repository
    copy.mkdir(parents=True)
    for name in ("training", "config", "requirements.txt"):
        (tmp_path / "repository" / name).symlink_to(ROOT / name)
    cells = {cell.id: cell for cell in opened.cells}
    few_steps = "--num-gpus 1 --max-steps 3 --test-size 20 --eval-steps 1000"
    cells["train"].source = cells["train"].source.replace('options = ""', f'options = "{few_steps}"')
    NotebookClient(opened, timeout=900, resources={"metadata": {"path": str(copy)}}).execute()
    printed = "".join(output.get("text", "") for output in cells["train"].outputs)
    assert "exact match on all 20 held-out rows" in printed
    [picture] = [output.data["image/png"] for output in cells["picture"].outputs]
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    answers = "".join(output.get("text", "") for output in cells["ask"].outputs)
    assert answers.count(" -> ") == 4
    [model] = (tmp_path / "repository" / "runs").glob("demo__*/run.json")
    assert read_run_record(model.parent)["status"] == "finished"


def test_the_demo_notebook_outside_a_repository_asks_for_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = {cell.id: cell.source for cell in nbformat.read(DEMO_NOTEBOOK, as_version=4).cells}
    with pytest.raises(AssertionError, match=r"is not in the repository\. Type its address above"):
        exec(cells["find"], {})
    (tmp_path / "remote" / "training").mkdir(parents=True)
    (tmp_path / "remote" / "training" / "trainer.py").touch()
    git = ("git", "-C", "remote", "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "--message", "a")):
        subprocess.run([*git, *words], check=True)
    for _ in range(2):  # a second Run All finds the clone
        exec(cells["find"].replace('address = ""', f'address = "{tmp_path / "remote"}"'), {})
        assert Path.cwd() == tmp_path / "dolly"
        monkeypatch.chdir(tmp_path)
