"""Prompts and text files are read without the libraries that only Parquet and the Hub need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_prompts_and_text_files_import_no_datasets_pyarrow_or_torch(tmp_path: Path) -> None:
    prompts, rows = tmp_path / "prompts.txt", tmp_path / "rows.csv"
    prompts.write_text("Name a river.\n")
    rows.write_text("instruction,output\nSay 1.,1\n")
    code = (
        "import sys; from training.run import preflight; from training.data.prompt_files import read_prompts\n"
        "from training.data.rows import read_columns\n"
        "assert read_prompts(sys.argv[1]) == [('Name a river.', '', ())]; assert len(read_columns(sys.argv[2])) == 1\n"
        "print(sorted({'datasets', 'pyarrow', 'torch', 'transformers'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, str(prompts), str(rows)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
