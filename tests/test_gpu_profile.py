"""@gpu_profile: what its card shows, that it stays small, and that none of its faults reaches the step.

NVIDIA's library is stood in for by standin_nvml.c; nvidia-ml-py, psutil, Metaflow and Chromium are the real ones.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
from metaflow.exception import MetaflowException

from flows import gpu_profile
from flows.gpu_profile import Lines, Profiler, Run, Series
from training.consts import METRICS_FILE, SAMPLES_FILE
from training.storage.metrics import append, forget_after

ROOT = Path(__file__).parents[1]
FLOW = ROOT / "tests" / "profiled_flow.py"
MIB = 2**20


class Card:
    """A card that keeps what it is given, and draws it as Metaflow does."""

    def __init__(self, fails: bool = False):
        self.parts: list[Any] = []
        self.fails = fails
        self.refreshed: list[bool] = []

    def clear(self) -> None:
        self.parts = []

    def extend(self, parts: list[Any]) -> None:
        self.parts = list(parts)

    def refresh(self, force: bool = False) -> None:
        self.refreshed.append(force)
        if self.fails:
            raise OSError("no process can be started")

    def drawn(self) -> list[dict[str, Any]]:
        return [part.render() for part in self.parts]

    def text(self) -> str:
        return json.dumps(self.drawn())


def profiler(card: Card, folder: Path | None = None, interval: float = 0.05) -> Profiler:
    return Profiler(card, "# a step", interval, lambda: folder)


def tables(drawn: list[dict[str, Any]], first: str) -> list[dict[str, Any]]:
    """Those whose first header is `first`."""
    return [part for part in drawn if part["type"] == "table" and part["columns"][:1] == [first]]


def words(row: list[Any]) -> list[str]:
    return [cell if isinstance(cell, str) else cell["source"].strip() for cell in row]


def charts(drawn: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    return {
        part["spec"]["title"]: part["spec"]["data"]["values"] for part in drawn if part["type"] == "vegaChart"
    }


# --- curves that stay small ---


def test_merging_keeps_the_mean_and_the_peak() -> None:
    series = Series(width=1, points=3)
    for x, value in enumerate([1, 1, 9, 1, 5]):
        series.add(x, {"GPU 0": value})
    assert series.rows() == [
        {"x": 0.5, "GPU 0": 1},
        {"x": 2.5, "GPU 0": 5, "max GPU 0": 9},
        {"x": 4, "GPU 0": 5},
    ]
    assert (series.mean("GPU 0"), series.peak("GPU 0")) == (3.4, 9)


def test_what_is_no_finite_number_is_left_out() -> None:
    series = Series(width=1)
    series.add(0, {"a": None, "b": float("nan"), "c": "12", "d": True, "e": float("inf")})
    assert series.rows() == []
    series.add(1, {"a": None, "b": 2})
    assert series.rows() == [{"x": 1, "b": 2}]
    assert series.peak("a") is None
    assert series.mean("a") is None


def test_ten_hours_of_eight_gpus_stay_small_and_lose_no_peak(tmp_path: Path) -> None:
    names = [f"GPU {n}" for n in range(8)]
    now = 0

    def read() -> tuple[dict[str, float], dict[str, float]]:
        busy = 100.0 if now == 12_345 else 50 + 37.123 * ((now * 7919) % 101) / 101
        return {name: busy - n for n, name in enumerate(names)}, dict.fromkeys(names, 20 + busy / 7)

    devices = [
        {"device": name, "type": "NVIDIA A100-SXM4-40GB", "memory_gib": 40.0, "bus": "00000000:10:00.0"}
        for name in names
    ]
    topology = {one: dict.fromkeys(names, "NV12") for one in names}
    card = Card()
    profile = profiler(card, tmp_path, interval=1.0)
    profile.gpus = SimpleNamespace(
        read=read, devices=devices, topology=topology, driver="550.54.15", cuda="12.4", close=lambda: None
    )
    profile.host = SimpleNamespace(
        cores=96, read=lambda folder: dict.fromkeys(["CPU", "memory", "disk", "memory GiB"], 33.3 + now % 7)
    )
    sizes = {}
    for now in range(36_000):
        profile.sample(float(now))
        if now + 1 in (600, 3_600, 36_000):
            profile.draw()
            sizes[now + 1] = (len(card.text()), len(pickle.dumps(profile._record())))
    for drawn, artifact in sizes.values():
        assert drawn < 150_000, sizes
        assert artifact < 150_000, sizes
    assert sizes[36_000][0] < 1.5 * sizes[3_600][0]
    kept = profile._record()["peaks"]["gpu_utilisation_percent"]
    assert kept == {name: 100.0 - n for n, name in enumerate(names)}
    curve = charts(card.drawn())["GPU utilisation"]
    assert 80 <= len(curve) <= gpu_profile.POINTS
    assert max(row["max GPU 0"] for row in curve) == 100
    unit, scale = gpu_profile.time_unit(36_000)
    assert unit.startswith("hours")
    assert profile.use.rows(scale)[-1]["x"] == pytest.approx(10, abs=0.1)


def test_a_chart_draws_the_maxima_where_there_are_any() -> None:
    row = {"x": 1, "GPU 0": 5, "GPU 1": 7, "another": 3}
    spec = gpu_profile.chart_spec("use", [row], ["GPU 0", "GPU 1"], "seconds", "%", top=100)
    assert [layer["transform"][0]["fold"] for layer in spec["layer"]] == [["GPU 0", "GPU 1"]]
    assert spec["data"]["values"] == [{"x": 1, "GPU 0": 5, "GPU 1": 7}]
    spec = gpu_profile.chart_spec(
        "use", [row | {"max GPU 1": 9}], ["GPU 0", "GPU 1"], "seconds", "%", top=100
    )
    assert [layer["transform"][0]["fold"] for layer in spec["layer"]] == [["max GPU 1"], ["GPU 0", "GPU 1"]]


# --- devices ---


@pytest.fixture(scope="session")
def nvml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libnvidia-ml.so.1 made of standin_nvml.c, for LD_LIBRARY_PATH."""
    folder = tmp_path_factory.mktemp("nvml")
    source = str(ROOT / "tests" / "standin_nvml.c")
    library = str(folder / "libnvidia-ml.so.1")
    subprocess.run(
        ["g++", "-x", "c", "-shared", "-fPIC", "-Wall", "-Wextra", source, "-o", library], check=True
    )
    return folder


READ_ALL = """
import json, os, sys
from flows.gpu_profile import Gpus
told = {}
for name in sys.argv[1:]:
    scene, _, lost = name.partition("-")
    os.environ["NVML_SCENE"] = scene
    os.environ["NVML_LOST"] = lost or "-1"
    try:
        gpus = Gpus()
        use, memory = gpus.read()
        told[name] = vars(gpus) | {"use": use, "memory": memory}
        for inner in ("nvml", "handles"):
            del told[name][inner]
        gpus.close()
    except Exception as error:
        told[name] = repr(error)
print(json.dumps(told))
"""


@pytest.fixture(scope="session")
def told(nvml_folder: Path) -> dict[str, Any]:
    """What Gpus says of each scene of the stand-in, and of one with a GPU that is lost."""
    scenes = ["nvswitch", "bridges", "mig", "old", "none", "bridges-1"]
    environment = os.environ | {"LD_LIBRARY_PATH": str(nvml_folder)}
    result = subprocess.run(
        [sys.executable, "-c", READ_ALL, *scenes],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(result.stdout.splitlines()[-1])


def test_every_call_to_nvml_is_one_that_nvidias_package_has() -> None:
    source = (ROOT / "flows" / "gpu_profile.py").read_text()
    names = set(re.findall(r"\b(?:pynvml|nvml)\.(\w+)", source))
    assert len(names) > 15
    assert [name for name in sorted(names) if not hasattr(pynvml, name)] == []


def test_driver_and_cuda_are_not_swapped(told: dict[str, Any]) -> None:
    assert (told["nvswitch"]["driver"], told["nvswitch"]["cuda"]) == ("550.54.15", "12.4")


def test_the_devices_are_told_with_type_memory_and_bus(told: dict[str, Any]) -> None:
    devices = told["nvswitch"]["devices"]
    assert len(devices) == 8
    assert devices[7] == {
        "device": "GPU 7",
        "type": "NVIDIA A100-SXM4-40GB",
        "memory_gib": 40.0,
        "bus": "00000000:17:00.0",
    }
    assert told["nvswitch"]["use"] == {f"GPU {n}": 10.0 * n + 5 for n in range(8)}
    assert told["nvswitch"]["memory"] == {f"GPU {n}": n + 1.0 for n in range(8)}


def test_gpus_on_an_nvswitch_are_all_connected(told: dict[str, Any]) -> None:
    topology = told["nvswitch"]["topology"]
    assert list(topology["GPU 0"].values()) == ["X", *["NV12"] * 7]
    assert list(topology["GPU 7"].values()) == [*["NV12"] * 7, "X"]


def test_bridges_connect_only_those_they_lead_to(told: dict[str, Any]) -> None:
    rows = [list(row.values()) for row in told["bridges"]["topology"].values()]
    assert rows == [
        ["X", "NV2", "NV1", "SYS"],
        ["NV2", "X", "SYS", "SYS"],
        ["NV1", "SYS", "X", "PIX"],
        ["SYS", "SYS", "PIX", "X"],
    ]


def test_a_board_that_is_lost_costs_none_of_the_others(told: dict[str, Any]) -> None:
    lost = told["bridges-1"]
    assert [device["device"] for device in lost["devices"]] == ["GPU 0", "GPU 2", "GPU 3"]
    assert lost["topology"]["GPU 0"] == {"GPU 0": "X", "GPU 2": "NV1", "GPU 3": "SYS"}


def test_what_an_old_driver_cannot_tell_costs_nothing_else(told: dict[str, Any]) -> None:
    assert told["old"]["topology"] == {
        "GPU 0": {"GPU 0": "X", "GPU 1": "PIX"},
        "GPU 1": {"GPU 0": "PIX", "GPU 1": "X"},
    }
    assert told["old"]["use"] == {"GPU 0": 5, "GPU 1": 15}


def test_of_a_divided_board_the_parts_are_told(told: dict[str, Any]) -> None:
    assert told["mig"]["use"] == {"GPU 0": None, "GPU 0 MIG 0": None, "GPU 0 MIG 1": None}
    assert told["mig"]["memory"] == {"GPU 0": None, "GPU 0 MIG 0": 1, "GPU 0 MIG 1": 2}
    assert told["mig"]["devices"][2] == {
        "device": "GPU 0 MIG 1",
        "type": "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "memory_gib": 20.0,
        "bus": None,
    }


def test_a_driver_without_gpus_says_so(told: dict[str, Any]) -> None:
    assert "NVML finds no GPU" in told["none"]


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_without_a_gpu_the_card_says_why_and_shows_the_host(tmp_path: Path) -> None:
    card = Card()
    profile = profiler(card, tmp_path)
    profile.start()
    time.sleep(0.5)
    record = profile.stop(None)
    drawn = card.drawn()
    assert "No NVIDIA GPU" in card.text()
    assert "NVMLError" in card.text()
    (devices,) = tables(drawn, "device")
    assert [row[0] for row in map(words, devices["data"])] == ["CPU", "memory", "disk"]
    assert re.fullmatch(r"\d+\.\d of \d+\.\d GiB", words(devices["data"][1])[-1])
    assert list(charts(drawn)) == ["host"]
    assert 0 < record["peaks"]["host"]["memory"] <= 100
    assert record["peaks"]["host"]["memory GiB"] < psutil.virtual_memory().total / 2**30
    assert record["devices"] == []
    assert 5 <= record["samples"] <= 11


def test_without_any_device_the_card_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    card = Card()
    profile = profiler(card, tmp_path)
    profile.start()
    time.sleep(0.2)
    profile.stop(None)
    assert "**No device can be read**" in card.text()
    assert "import of pynvml" in card.text()
    assert "import of psutil" in card.text()
    assert charts(card.drawn()) == {}


def test_in_a_container_its_own_limit_counts(tmp_path: Path) -> None:
    second = tmp_path / "v2"
    second.mkdir()
    (second / "memory.current").write_text(f"{900 * MIB}\n")
    (second / "memory.stat").write_text(f"anon {1}\ninactive_file {200 * MIB}\n")
    (second / "memory.max").write_text("max\n")
    assert gpu_profile.container_memory(second) is None
    (second / "memory.max").write_text(f"{1000 * MIB}\n")
    assert gpu_profile.container_memory(second) == (700 * MIB, 1000 * MIB)
    first = tmp_path / "v1" / "memory"
    first.mkdir(parents=True)
    (first / "memory.usage_in_bytes").write_text(f"{900 * MIB}\n")
    (first / "memory.stat").write_text(f"total_inactive_file {100 * MIB}\n")
    (first / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # no limit
    assert gpu_profile.container_memory(tmp_path / "v1") is None
    (first / "memory.limit_in_bytes").write_text(f"{1000 * MIB}\n")
    assert gpu_profile.container_memory(tmp_path / "v1") == (800 * MIB, 1000 * MIB)
    assert gpu_profile.container_memory(tmp_path / "nowhere") is None


# --- what a run tells ---


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "max_steps": 200, "epoch": step / 100, "seconds": 10.0 + 0.5 * step} | more


def test_lines_are_read_once_and_a_torn_one_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    lines = Lines(file)
    assert lines.new() == (False, [])
    append(file, {"step": 1})
    with open(file, "a") as stream:
        stream.write('nonsense\n[1]\n{"no": "step"}\n{"step": 2, "lo')
    assert lines.new() == (True, [{"step": 1}])
    assert lines.new() == (False, [])
    with open(file, "a") as stream:
        stream.write('ss": 3}\n')
    assert lines.new() == (False, [{"step": 2, "loss": 3}])


def test_a_resumed_run_is_drawn_without_what_it_forgot(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        append(tmp_path / METRICS_FILE, line(step, loss=float(step)))
        append(tmp_path / SAMPLES_FILE, {"step": step, "instruction": "Why?", "response": f"{step}"})
    run = Run(tmp_path)
    run.read()
    assert [row["x"] for row in run.loss.rows()] == [10, 20, 30]
    for name in (METRICS_FILE, SAMPLES_FILE):
        forget_after(tmp_path / name, 10)
    append(tmp_path / METRICS_FILE, line(20, loss=1.5))
    run.read()
    assert run.loss.rows() == [{"x": 10, "loss": 10}, {"x": 20, "loss": 1.5}]
    assert run.stages() == [10]


def test_progress_and_the_time_that_is_left(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.progress() == (0, "step 0", "time left not known yet")
    append(tmp_path / METRICS_FILE, line(40, loss=1.234, tokens_per_second=9012.3))
    run.read()
    words = "step 40 of 200, epoch 0.40, loss 1.23, 9,012 tokens/s"
    assert run.progress() == (20, words, "2 min left")  # 160 steps as the first 40: 30 s
    append(tmp_path / METRICS_FILE, line(100, eval_loss=1.5))
    run.read()  # 100 steps as the latest 60: 30 s
    words = "step 100 of 200, epoch 1.00, loss 1.23, held-out loss 1.5, 9,012 tokens/s"
    assert run.progress() == (50, words, "50 s left")
    append(tmp_path / METRICS_FILE, line(200, loss=1.0))
    run.read()
    assert (run.progress()[0], run.progress()[2]) == (100, "at its end")


def test_durations_are_told_in_words() -> None:
    assert [gpu_profile.duration(s) for s in (0, 59.6, 100, 3599, 12_000)] == [
        "0 s", "60 s", "2 min", "1 h 0 min", "3 h 20 min",
    ]  # fmt: skip


def test_the_answers_stand_one_column_a_stage(tmp_path: Path) -> None:
    for step in (0, 100):
        for question, context in (("Name a river.", ""), ("Shorten.", "Long text")):
            entry = {"step": step, "epoch": step / 80, "instruction": question, "input": context}
            append(tmp_path / SAMPLES_FILE, entry | {"response": f"{question} {step}"})
    run = Run(tmp_path)
    run.read()
    assert run.answer_table() == (
        ["instruction", "epoch 0.00", "epoch 1.25"],
        [
            ["Name a river.", "Name a river. 0", "Name a river. 100"],
            ["Shorten.\nLong text", "Shorten. 0", "Shorten. 100"],
        ],
    )


def test_of_many_stages_the_first_the_last_and_some_between_are_shown(tmp_path: Path) -> None:
    for step in range(0, 5000, 10):
        for prompt in range(30):
            entry = {"step": step, "instruction": f"Say {prompt}.", "response": f"{step} " * 10_000}
            append(tmp_path / SAMPLES_FILE, entry) if step < 100 or prompt == 0 else None
    run = Run(tmp_path)
    run.read()
    headers, rows = run.answer_table()
    assert (headers[1], headers[-1], len(headers)) == ("step 0", "step 4,990", 1 + gpu_profile.STAGES_SHOWN)
    assert len(rows) == gpu_profile.PROMPTS
    assert max(len(cell) for row in rows for cell in row) == gpu_profile.ANSWER_CHARACTERS
    assert len(run.answers) <= gpu_profile.STAGES_KEPT
    assert len(json.dumps([headers, rows])) < 60_000


def test_the_card_follows_the_run(tmp_path: Path) -> None:
    card = Card()
    profile = profiler(card, tmp_path)
    profile.draw()
    assert "Nothing told yet" in card.text()
    append(tmp_path / METRICS_FILE, line(10, loss=2.0, tokens_per_second=9000.0))
    assert profile.draw()
    before = charts(card.drawn())
    assert before == {"loss": [{"x": 10, "loss": 2.0}], "speed": [{"x": 10, "tokens/s": 9000.0}]}
    append(tmp_path / METRICS_FILE, line(20, eval_loss=1.75))
    assert not profile.draw(), "the same components, so that no whole card is drawn"
    assert charts(card.drawn())["loss"] == [{"x": 10, "loss": 2.0}, {"x": 20, "held-out loss": 1.75}]
    append(tmp_path / SAMPLES_FILE, {"step": 20, "instruction": "Why?", "response": "So."})
    assert profile.draw()
    assert tables(card.drawn(), "instruction")[0]["data"] == [["Why?", "So."]]
    assert [part["value"] for part in card.drawn() if part["type"] == "progressBar"] == [10]


# --- faults ---


def wait_until(done: Callable[[], Any]) -> None:
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until
        time.sleep(0.01)


def raising(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("planted")


def plant_nvml(profile: Profiler, folder: Path) -> None:
    devices = [{"device": "GPU 0", "type": "A100", "memory_gib": 40.0, "bus": None}]
    profile.gpus = SimpleNamespace(
        read=raising, close=raising, devices=devices, topology={}, driver="550", cuda="12.4"
    )


def plant_host(profile: Profiler, folder: Path) -> None:
    assert profile.host
    profile.host.psutil = SimpleNamespace(cpu_percent=raising, virtual_memory=raising)


def plant_run(profile: Profiler, folder: Path) -> None:
    (folder / METRICS_FILE).unlink()
    (folder / METRICS_FILE).mkdir()


def plant_folder(profile: Profiler, folder: Path) -> None:
    profile.folder = raising


def plant_refresh(profile: Profiler, folder: Path) -> None:
    profile.card.fails = True


@pytest.mark.parametrize(
    ("plant", "part"),
    [
        (plant_nvml, "GPUs"),
        (plant_host, "host"),
        (plant_run, "run"),
        (plant_folder, "run folder"),
        (plant_refresh, "card"),
    ],
)
def test_a_fault_is_told_and_costs_nothing_else(
    plant: Callable[[Profiler, Path], None], part: str, tmp_path: Path
) -> None:
    append(tmp_path / METRICS_FILE, line(10, loss=2.0))
    card = Card()
    profile = profiler(card, tmp_path)
    profile.start()
    wait_until(lambda: card.refreshed)
    plant(profile, tmp_path)
    wait_until(lambda: part in profile.faults)
    before = profile.count
    wait_until(lambda: profile.count > before)
    record = profile.stop(ValueError("the step's own"))
    assert "planted" in record["faults"][part] or part in ("run", "card")
    told = [words(row) for row in tables(card.drawn(), "part")[0]["data"]]
    assert part in {name for name, _ in told}
    assert "ValueError: the step's own" in card.text()
    assert charts(card.drawn())["loss"] == [{"x": 10, "loss": 2.0}], "what was read before stays"
    assert "host" in charts(card.drawn())


def test_a_section_that_cannot_be_drawn_costs_none_of_the_others(tmp_path: Path) -> None:
    append(tmp_path / METRICS_FILE, line(10, loss=2.0))
    card = Card()
    profile = profiler(card, tmp_path)
    profile.host = gpu_profile.Host()
    profile.sample(0.0)
    profile.draw()
    assert profile.run
    profile.run.progress = raising
    profile.draw()
    profile.draw()
    assert list(charts(card.drawn())) == ["host"]
    assert tables(card.drawn(), "part")[0]["data"] == [["card", "RuntimeError: planted"]]


def test_options_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(MetaflowException, match=r"interval is 0; give seconds, 0\.1 or more"):
        gpu_profile.gpu_profile(interval=0).external_init()
    with pytest.raises(MetaflowException, match=r"run_folder is '/tmp/x'.*for self\.output"):
        gpu_profile.gpu_profile(run_folder="/tmp/x").external_init()


def test_nothing_of_the_project_and_no_torch_comes_with_the_file(tmp_path: Path) -> None:
    shutil.copy(ROOT / "flows" / "gpu_profile.py", tmp_path)
    code = "import sys, gpu_profile; print([m for m in ('torch', 'training', 'psutil', 'pynvml') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_without_metaflow_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (ROOT / "flows" / "gpu_profile.py").read_text()
    monkeypatch.setitem(sys.modules, "metaflow", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[metaflow\]'"):
        exec(compile(source, "gpu_profile.py", "exec"), {"__name__": "gpu_profile"})


# --- real runs ---


class FlowRun:
    """One run of profiled_flow.py in a process of its own, with metadata of its own."""

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

    def wait(self) -> int:
        return self.process.wait(timeout=300)

    def output(self) -> str:
        return (self.folder / "log").read_text()

    def card(self, step: str = "start") -> tuple[str, list[dict[str, Any]]]:
        """(HTML, components), as `card get` gives it to a person; ("", []) as long as there is none."""
        html = self.folder / f"{step}.html"
        command = [sys.executable, str(FLOW), "card", "get", step, str(html)]
        result = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True
        )
        if result.returncode or not html.exists():
            return "", []
        text = html.read_text()
        (data,) = re.findall(r"[\w+/]{500,}={0,2}", max(re.findall(r'"([\w+/=]{500,})"', text), key=len))
        page = json.loads(base64.b64decode(data))["components"][0]
        parts = page["contents"]
        while len(parts) == 1 and "contents" in parts[0]:
            parts = parts[0]["contents"]
        return text, parts

    def data(self) -> dict[str, Any]:
        """The newest figures that a refresh gave to those who look on."""
        files = list((self.folder / ".metaflow" / "mf.cards").rglob("steps/start/**/*.data.json"))
        return json.loads(files[0].read_text()) if files else {}


@pytest.fixture(scope="module")
def flow_runs(tmp_path_factory: pytest.TempPathFactory, nvml_folder: Path) -> Iterator[dict[str, Any]]:
    """A run that ends well and is looked at while it runs; two that fail; and one whose profile breaks."""
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
        runs[name].wait()
    return runs


@pytest.mark.slow
def test_a_run_is_drawn_whole(flow_runs: dict[str, Any]) -> None:
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
    assert "could not do" not in text


@pytest.mark.slow
def test_the_card_changes_while_the_step_runs(flow_runs: dict[str, Any]) -> None:
    looks, figures = flow_runs["looks"], flow_runs["figures"]
    assert len(looks) >= 2, "what `card get` shows"
    assert len(looks[0]) < len(looks[1]) < 120
    assert len(figures) >= 2, "what a browser is given between"


@pytest.mark.slow
def test_the_profile_is_an_artifact_that_a_join_can_merge(flow_runs: dict[str, Any]) -> None:
    run = flow_runs["well"]
    code = (
        "import json; from metaflow import Flow, namespace; namespace(None)\n"
        "data = Flow('ProfiledFlow').latest_run['end'].task.data\n"
        "print(json.dumps({n: getattr(data, n) for n in ('gpu_profile_start', 'gpu_profile_part_0', "
        "'gpu_profile_part_1')}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=run.environment, cwd=run.folder, capture_output=True, text=True
    )
    told = json.loads(result.stdout)
    profile = told["gpu_profile_start"]
    assert profile["peaks"]["gpu_utilisation_percent"] == {f"GPU {n}": 10 * n + 5 for n in range(4)}
    assert profile["samples"] > 20
    assert profile["faults"] == {}
    assert told["gpu_profile_part_0"]["devices"] == profile["devices"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "why"),
    [("raise", "ValueError: rank 3 was <b>killed</b>"), ("exit", "The step left before its end")],
)
def test_a_failed_step_has_its_last_figures_and_why(flow_runs: dict[str, Any], name: str, why: str) -> None:
    run = flow_runs[name]
    assert run.process.returncode == 1, run.output()
    _, parts = run.card()
    assert "The step has failed" in json.dumps(parts)
    error = next(part["data"] for part in parts if part["type"] == "pythonCode")
    assert error.rstrip().splitlines()[-1].startswith(why)
    assert [row["x"] for row in charts(parts)["loss"]] == [10 * n for n in range(1, 13)], "to the last line"
    if name == "raise":
        assert "ValueError: rank 3 was" in run.output(), "as without the profile"


@pytest.mark.slow
def test_a_step_whose_profile_breaks_goes_on(flow_runs: dict[str, Any]) -> None:
    run = flow_runs["broken"]
    assert run.process.returncode == 0, run.output()
    _, parts = run.card()
    told = dict(map(words, tables(parts, "part")[0]["data"]))
    assert set(told) == {"GPUs", "host", "run", "card"}
    assert "GPU is lost" in told["GPUs"]
    assert len(charts(parts)["loss"]) == 12
    assert len(charts(parts)["GPU utilisation"]) == 2, "two samples before the driver died"


@pytest.mark.slow
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
    result = subprocess.run(
        [
            "chromium",
            *flags.split(),
            "--host-resolver-rules=MAP * 127.0.0.1:9",
            f"--user-data-dir={tmp_path}",
            f"file://{page}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    dom = result.stdout
    drawn = re.findall(r'<svg[^>]* class="marks".*?</svg>', dom, re.DOTALL)
    titles = ["loss", "speed", "GPU utilisation", "GPU memory", "host"]
    assert [title for title, svg in zip(titles, drawn, strict=True) if f">{title}<" in svg] == titles
    assert all("mark-line role-mark" in svg for svg in drawn)
    assert all(f">{name}<" in drawn[2] for name in ("GPU 0", "GPU 3"))
    assert ">held-out loss<" in drawn[0]
    assert "the 1 answer" in dom
    assert "&lt;img src=x" in dom, "an answer is text"
    assert "<img src=x" not in re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    assert "<title>1</title>" not in dom
    assert "Tesla V100" in dom
    if name == "raise":
        assert "killed" in dom


@pytest.mark.slow
def test_the_live_cards_are_served_to_this_machine_alone(flow_runs: dict[str, Any]) -> None:
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
