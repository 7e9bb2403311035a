"""Runs in the environment of an installed wheel, in another folder: see test_installed.py.

Reads the commands of the pages as [[module, words], ...] from stdin. Prints where the package lies and what it answered.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from training import demo
from training.errors import OptionsError, install_extra
from training.launch.spark import spark_problems
from training.options.command_line import value_problems
from training.options.deepspeed import read_json
from training.plan.presets import preset_options

FEW_STEPS = "--max-steps 2 --test-size 20 --eval-steps 1000"


def command(module: str) -> Any:
    try:
        return importlib.import_module(f"{module}.__main__").main
    except ModuleNotFoundError:
        return importlib.import_module(module).main


def answer(module: str, *words: str) -> tuple[int, str]:
    """Exit code and output of a command of the package."""
    result = CliRunner().invoke(command(module), words, catch_exceptions=False)
    return result.exit_code, result.output


def parse(module: str, words: list[str]) -> None:
    """Raises what the command line raises, and OptionsError if the DeepSpeed JSON is not found."""
    context = command(module).make_context(module, list(words))
    assert not value_problems(context), value_problems(context)
    if file := context.params.get("deepspeed"):
        read_json(file)


def main() -> None:
    pages = json.load(sys.stdin)
    for module, words in pages:
        parse(module, words)
    for module in {module for module, _ in pages}:
        code, text = answer(module, "--help")
        assert code == 0, module
        assert "Usage:" in text, module
    for family in ("a100", "a10", "v100"):
        options = preset_options(family, 16) | {"epochs": 1, "local_output_dir": "/mnt/shared/dolly"}
        assert not [problem for problem in spark_problems(options, 2, 8) if "--deepspeed" in problem]
    try:
        read_json("config/none.json")
    except OptionsError as error:
        missing = str(error)
    Path("config").mkdir()
    Path("config/ds_z3_bf16_config.json").write_text('{"of": "the working folder"}')
    own = read_json("config/ds_z3_bf16_config.json")
    Path("config/ds_z3_bf16_config.json").unlink()
    sys.path[:0] = [".", "flows"]
    flow, cells = importlib.import_module("train_dolly_flow"), importlib.import_module("notebooks.cells")
    demo.answers = lambda folder, rows: ["not asked"] * len(rows)  # 800 answers take long
    answers = {
        "demo": answer("training.demo", *"--num-gpus 1 --local-output-dir out".split(), *FEW_STEPS.split()),
        "packages": [importlib.import_module("training").__path__[0], Path(cells.__file__).parents[1].name],
        "missing": missing,
        "extra": install_extra("s3"),
        "own": own,
        "plan": answer("training.plan", "--machine", "8xA100-40GB"),
        "notebook": answer("training.notebook", "notebooks/train_dolly.py", "--out", "new.ipynb", "--no-run"),
        "generate": answer("training.generate", "--model", "out", "--max-new-tokens", "4", "Name a river."),
        "publish": answer("training.publish", "--model", "out", "--to", "copy"),
        "export": answer("training.export", "--checkpoint", "out/checkpoint-2", "--to", "exported"),
        "sources": [str(path) for path in flow.SOURCES],
    }
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
