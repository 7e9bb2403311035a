"""A flow with @gpu_profile on its steps, for test_gpu_profile_runs.py. Environment variables control it.

PROFILED_RUN     the folder that the first step's run writes into, line by line
PROFILED_LINES   number of lines of metrics it writes, one every 0.25 s
PROFILED_END     how the first step ends: "well" (then comes a foreach with a join), "raise" or "exit"
PROFILED_BREAK   1: everything the profile uses breaks while the step runs
"""

import os
import sys
import time
from pathlib import Path

from metaflow import FlowSpec, step

sys.path[:0] = [str(Path(__file__).parents[2] / "flows"), str(Path(__file__).parents[2])]
from gpu_profile import gpu_profile  # noqa: E402

from training.consts import METRICS_FILE, SAMPLES_FILE  # noqa: E402
from training.storage.metrics import append  # noqa: E402

RESPONSE = '# <img src=x onerror="document.title=1"> the {} answer'


def break_everything(folder: Path) -> None:
    """Makes psutil, the run's files and Metaflow's cards fail from now on."""
    import psutil
    from metaflow.plugins.cards.component_serializer import CardComponentManager

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("planted")

    CardComponentManager.refresh = broken
    time.sleep(2)  # some samples are taken first
    psutil.cpu_percent = psutil.virtual_memory = broken
    (folder / SAMPLES_FILE).mkdir()


class ProfiledFlow(FlowSpec):
    @gpu_profile(interval=0.25, run_folder="output")
    @step
    def start(self):
        folder = Path(os.environ["PROFILED_RUN"])
        folder.mkdir()
        self.output = str(folder)
        if os.environ.get("PROFILED_BREAK"):
            break_everything(folder)
        for line in range(1, int(os.environ["PROFILED_LINES"]) + 1):
            now = {"step": 10 * line, "max_steps": 797, "epoch": line / 80, "seconds": 6.0 * line}
            append(folder / METRICS_FILE, now | {"loss": 3 / line, "tokens_per_second": 9000.0 + line})
            if line % 5 == 0:
                append(folder / METRICS_FILE, now | {"eval_loss": 3.5 / line})
            if line % 10 == 1 and not os.environ.get("PROFILED_BREAK"):
                answer = {"instruction": "Name a river.", "input": "", "response": RESPONSE.format(line)}
                append(folder / SAMPLES_FILE, {"step": now["step"], "epoch": now["epoch"]} | answer)
            time.sleep(0.25)
        if os.environ["PROFILED_END"] == "raise":
            raise ValueError("rank 3 was <b>killed</b>")
        if os.environ["PROFILED_END"] == "exit":
            sys.exit(3)
        self.parts = [0, 1]
        self.next(self.part, foreach="parts")

    @gpu_profile
    @step
    def part(self):
        self.next(self.join)

    @step
    def join(self, inputs):
        self.merge_artifacts(inputs)
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    ProfiledFlow()
