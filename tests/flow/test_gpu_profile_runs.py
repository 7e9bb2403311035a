"""@gpu_profile on real runs: the card during a step, after a failure, and in a browser."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows import gpu_profile
from tests.conftest import python
from tests.flow.test_gpu_profile import ROOT, charts, tables, wait_until, words

FLOW = ROOT / "tests" / "flow" / "profiled_flow.py"

pytestmark = pytest.mark.slow


class FlowRun:
    """One run of profiled_flow.py in its own process, with its own metadata."""

    def __init__(self, folder: Path, **settings: str):
        self.folder = folder
        self.environment = os.environ | {
            "METAFLOW_USER": "tester",
            "METAFLOW_HOME": str(folder / "home"),
            "METAFLOW_DEFAULT_METADATA": "local",
            "METAFLOW_DEFAULT_DATASTORE": "local",
            "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(folder),
            "PROFILED_RUN": str(folder / "run"),
            **settings,
        }
        self.log = open(folder / "log", "w")  # noqa: SIM115
        command = [sys.executable, str(FLOW), "run"]
        self.process = subprocess.Popen(
            command, env=self.environment, cwd=folder, stdout=self.log, stderr=subprocess.STDOUT
        )

    def python(self, *words: object) -> subprocess.CompletedProcess[str]:
        return python(*words, env=self.environment, cwd=self.folder)

    def output(self) -> str:
        return (self.folder / "log").read_text()

    def card(self, step: str = "start") -> tuple[str, list[dict[str, Any]]]:
        """(HTML, components) of `card get`; ("", []) if there is no card yet."""
        html = self.folder / f"{step}.html"
        if self.python(FLOW, "card", "get", step, html).returncode or not html.exists():
            return "", []
        text = html.read_text()
        (data,) = re.findall(r"[\w+/]{500,}={0,2}", max(re.findall(r'"([\w+/=]{500,})"', text), key=len))
        page = json.loads(base64.b64decode(data))["components"][0]
        parts = page["contents"]
        while len(parts) == 1 and "contents" in parts[0]:
            parts = parts[0]["contents"]
        return text, parts

    def data(self) -> dict[str, Any]:
        """The newest figures that a refresh wrote for browsers."""
        files = list((self.folder / ".metaflow" / "mf.cards").rglob("steps/start/**/*.data.json"))
        return json.loads(files[0].read_text()) if files else {}


@pytest.fixture(scope="module")
def flow_runs(tmp_path_factory: pytest.TempPathFactory, nvml_folder: Path) -> Iterator[dict[str, Any]]:
    """A run that succeeds and is watched while it runs, two that fail, and one whose profile breaks."""
    gpus = {"LD_LIBRARY_PATH": str(nvml_folder), "NVML_SCENE": "bridges"}
    runs: dict[str, Any] = {}

    def begin(name: str, **settings: str) -> FlowRun:
        runs[name] = FlowRun(tmp_path_factory.mktemp(name), **settings)
        return runs[name]

    well = begin("well", PROFILED_LINES="120", PROFILED_END="well", **gpus)
    runs["looks"], runs["figures"] = [], []
    until = time.monotonic() + 240
    while well.process.poll() is None and (len(runs["looks"]) < 2 or len(runs["figures"]) < 2):
        assert time.monotonic() < until, well.output()
        figures = json.dumps(well.data())
        if '"loss"' in figures and figures not in runs["figures"]:
            runs["figures"].append(figures)
        _, parts = well.card()
        if charts(parts).get("loss") and charts(parts)["loss"] not in runs["looks"]:
            runs["looks"].append(charts(parts)["loss"])
        time.sleep(2)
    begin("raise", PROFILED_LINES="12", PROFILED_END="raise", **gpus)
    begin("exit", PROFILED_LINES="12", PROFILED_END="exit")
    begin("broken", PROFILED_LINES="12", PROFILED_END="well", PROFILED_BREAK="1", NVML_DIES="5", **gpus)
    for name in ("well", "raise", "exit", "broken"):
        runs[name].process.wait(timeout=300)
    return runs


def test_a_finished_run_is_drawn_completely(flow_runs: dict[str, Any]) -> None:
    run = flow_runs["well"]
    assert run.process.returncode == 0, run.output()
    _, parts = run.card()
    drawn = charts(parts)
    assert [row["x"] for row in drawn["loss"]] == [10 * n for n in range(1, 121)]
    assert sum("held-out loss" in row for row in drawn["loss"]) == 24
    assert drawn["speed"][-1]["tokens/s"] == 9120
    assert {"GPU utilisation", "GPU memory", "host"} < set(drawn)
    (answers,) = tables(parts, "instruction")
    assert len(answers["columns"]) == 1 + gpu_profile.STAGES_SHOWN
    assert answers["data"][0][:2] == [
        "Name a river.",
        '# <img src=x onerror="document.title=1"> the 1 answer',
    ]
    assert answers["data"][0][-1].endswith("the 111 answer")
    (devices,) = tables(parts, "device")
    assert words(devices["data"][3]) == [
        "GPU 3", "Tesla V100-SXM2-32GB, 00000000:13:00.0", "35 %", "35 %", "4.0 of 40.0 GiB",
    ]  # fmt: skip
    (links,) = tables(parts, "")
    assert links["data"][0] == ["GPU 0", "X", "NV2", "NV1", "SYS"]
    text = json.dumps(parts)
    assert "Driver 550.54.15, CUDA 12.4" in text
    assert "The step has ended" in text
    assert "Errors of the profile" not in text


def test_the_card_changes_while_the_step_runs(flow_runs: dict[str, Any]) -> None:
    looks, figures = flow_runs["looks"], flow_runs["figures"]
    assert len(looks) >= 2, "`card get` shows new figures"
    assert len(looks[0]) < len(looks[1]) < 120
    assert len(figures) >= 2, "a browser gets new figures in between"


def test_the_profile_is_an_artifact_that_a_join_can_merge(flow_runs: dict[str, Any]) -> None:
    run = flow_runs["well"]
    code = (
        "import json; from metaflow import Flow, namespace; namespace(None)\n"
        "data = Flow('ProfiledFlow').latest_run['end'].task.data\n"
        "print(json.dumps({n: getattr(data, n) for n in ('gpu_profile_start', 'gpu_profile_part_0', "
        "'gpu_profile_part_1')}))"
    )
    profiles = json.loads(run.python("-c", code).stdout)
    profile = profiles["gpu_profile_start"]
    assert profile["peaks"]["gpu_utilisation_percent"] == {f"GPU {n}": 10 * n + 5 for n in range(4)}
    assert profile["samples"] > 20
    assert profile["faults"] == {}
    assert profiles["gpu_profile_part_0"]["devices"] == profile["devices"]


@pytest.mark.parametrize(
    ("name", "why"),
    [("raise", "ValueError: rank 3 was <b>killed</b>"), ("exit", "The step ended early")],
)
def test_a_failed_step_shows_its_last_figures_and_the_error(
    flow_runs: dict[str, Any], name: str, why: str
) -> None:
    run = flow_runs[name]
    assert run.process.returncode == 1, run.output()
    _, parts = run.card()
    assert "The step has failed" in json.dumps(parts)
    error = next(part["data"] for part in parts if part["type"] == "pythonCode")
    assert error.rstrip().splitlines()[-1].startswith(why)
    assert [row["x"] for row in charts(parts)["loss"]] == [10 * n for n in range(1, 13)], "to the last line"
    if name == "raise":
        assert "ValueError: rank 3 was" in run.output(), "the step's own error is still printed"


def test_a_step_continues_if_its_profile_breaks(flow_runs: dict[str, Any]) -> None:
    run = flow_runs["broken"]
    assert run.process.returncode == 0, run.output()
    _, parts = run.card()
    errors = dict(map(words, tables(parts, "part")[0]["data"]))
    assert set(errors) == {"GPUs", "host", "run", "card"}
    assert "GPU is lost" in errors["GPUs"]
    assert len(charts(parts)["loss"]) == 12
    assert len(charts(parts)["GPU utilisation"]) == 2, "two samples before the driver died"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium")
@pytest.mark.parametrize("name", ["well", "raise"])
def test_a_browser_draws_the_card_without_a_network(
    flow_runs: dict[str, Any], name: str, tmp_path: Path
) -> None:
    flow_runs[name].card()
    page = flow_runs[name].folder / "start.html"
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    )
    flags += " --disable-component-update --disable-sync --virtual-time-budget=10000 --dump-dom"
    places = ["--host-resolver-rules=MAP * 127.0.0.1:9", f"--user-data-dir={tmp_path}", f"file://{page}"]
    command = ["chromium", *flags.split(), *places]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    drawn = re.findall(r'<svg[^>]* class="marks".*?</svg>', dom, re.DOTALL)
    titles = ["loss", "speed", "GPU utilisation", "GPU memory", "host"]
    assert [title for title, svg in zip(titles, drawn, strict=True) if f">{title}<" in svg] == titles
    assert all("mark-line role-mark" in svg for svg in drawn)
    assert all(f">{name}<" in drawn[2] for name in ("GPU 0", "GPU 3"))
    assert ">held-out loss<" in drawn[0]
    assert "the 1 answer" in dom
    assert "&lt;img src=x" in dom, "an answer is shown as text"
    assert "<img src=x" not in re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    assert "<title>1</title>" not in dom
    assert "Tesla V100" in dom
    if name == "raise":
        assert "killed" in dom


def test_live_cards_are_served_on_this_machine_only(flow_runs: dict[str, Any]) -> None:
    run = flow_runs["well"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "flows" / "gpu_profile.py"), str(FLOW), "--port", str(port)]
    server = subprocess.Popen(command, env=run.environment, cwd=run.folder, stdout=subprocess.PIPE)
    try:
        process = psutil.Process(server.pid)
        wait_until(lambda: server.poll() is not None or process.net_connections())
        assert server.poll() is None, server.stdout
        assert {place.laddr for place in process.net_connections()} == {("127.0.0.1", port)}
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/runinfo", timeout=60) as answer:
            cards = json.load(answer)["cards"]
        assert "gpu_profile" in {card["card_object"]["id"] for card in cards}
    finally:
        server.kill()
        server.wait()
