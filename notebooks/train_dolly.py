# Databricks notebook source
# MAGIC %md
# MAGIC # Train Dolly
# MAGIC Fine-tunes GPT-J-6B on Stanford Alpaca with DeepSpeed ZeRO-3, so that it follows instructions. Choose your GPU
# MAGIC family above and press **Run All**. At the end you have a model and its answers. With `cpu` a small model learns
# MAGIC the built-in demo in a few minutes, on any machine.
# MAGIC
# MAGIC For research only: Stanford Alpaca is CC BY-NC 4.0.

# COMMAND ----------

# MAGIC %md
# MAGIC ## Install
# MAGIC Installs the tested versions of packages that the environment does not have.

# COMMAND ----------

# MAGIC %pip install --quiet --disable-pip-version-check -r ../requirements.txt peft==0.21.2 bitsandbytes==0.50.2

# COMMAND ----------

# Databricks has already imported other versions of some packages. A new Jupyter kernel has not.
if "dbutils" in globals():
    dbutils.library.restartPython()

# COMMAND ----------

# MAGIC %md
# MAGIC ## What to train
# MAGIC Says what this machine has, and chooses GPU family and folders by it. The other defaults are Dolly's run. An empty
# MAGIC field means the value in brackets. On Databricks the fields are at the top of the page. Elsewhere use `--set`.

# COMMAND ----------

import sys
from pathlib import Path

# Databricks and Jupyter start in the notebook's folder, which is in the repository, or beside an installed wheel.
here = Path.cwd()
roots = [folder for folder in [here, *here.parents] if (folder / "notebooks" / "cells.py").is_file()]
assert roots, f"{here} is not in the repository. Open the notebook in its Git folder"
sys.path.insert(0, str(roots[0]))

from notebooks import cells, found, results
from training import notebook
from training.launch.restart import DEFAULT_RESTARTS
from training.machine.catalogue import FAMILIES
from training.plan.presets import METHODS

if "dbutils" not in globals():
    dbutils = notebook.DbutilsStandIn()

print(found.description())
dbutils.widgets.dropdown("gpu_family", found.default_family(), list(FAMILIES), "GPU family (cpu: the demo)")
dbutils.widgets.dropdown("method", "auto", ["auto", *METHODS], "Method (auto: what fits one GPU)")
dbutils.widgets.text("num_gpus", "", "GPUs of each node (all)")
dbutils.widgets.text("num_nodes", "1", "Nodes")
dbutils.widgets.text("input_model", "", "Base model (EleutherAI/gpt-j-6B; cpu: demo)")
dbutils.widgets.text("training_dataset", "", "Datasets, with commas (tatsu-lab/alpaca; cpu: demo)")
dbutils.widgets.text("dataset_config", "", "Configuration of a Hub dataset (its only one)")
dbutils.widgets.text("dataset_split", "", "Split of a Hub dataset (train)")
dbutils.widgets.text("dataset_revision", "", "Revision of a Hub dataset (the newest)")
dbutils.widgets.text("test_size", "", "Held-out rows (a tenth, at most 1,000; demo: 400)")
dbutils.widgets.text("epochs", "", "Epochs (1; demo: 6)")
dbutils.widgets.text(
    "local_training_root", found.default_training_root(), "Folder of the runs, on a local disk"
)
dbutils.widgets.text(
    "dbfs_output_root", found.default_output_root(), "Folder of the models: DBFS, a Volume, s3://, hf://me"
)
dbutils.widgets.text("checkpoint_root", "", "Copies of the checkpoints: DBFS, a Volume, s3:// (none)")
dbutils.widgets.text("restarts", str(DEFAULT_RESTARTS), "Restarts after a kill (0: none)")
dbutils.widgets.text("resume", "", "Run to continue (a new run)")
dbutils.widgets.text("mlflow_model_name", "", "Register in MLflow as (no MLflow)")

# COMMAND ----------

# MAGIC %md
# MAGIC ## The run and its folders
# MAGIC A run trains on a local disk, where files can be changed, and is copied when it has finished. Both folders have
# MAGIC the name of the run. If the run stops, type this name into `resume`.

# COMMAND ----------

choices = cells.read_widgets(dbutils.widgets)
tensorboard_logs = str(choices.output / "runs")
print(f"{choices.name}\n  trained in       {choices.output}\n  published to     {choices.published}")
print(f"  checkpoints to   {choices.checkpoint_to}")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Does it fit?
# MAGIC The GPU family sets the options. A step has 64 rows. The plan says whether the run fits, and how long it takes. On
# MAGIC one GPU it also chooses the method: all weights (full), adapters (lora), or adapters on a model in 4 bits (qlora).

# COMMAND ----------

from training.plan.presets import demo_recipe

machine = cells.find_machine(choices)
num_gpus = machine.count
ranks = num_gpus * choices.num_nodes
options = {
    "input_model": choices.input_model,
    **choices.dataset_options,
    **(demo_recipe(choices.training_dataset) if choices.is_demo else {}),
    "epochs": choices.epochs,
    "local_output_dir": str(choices.output),
    "dbfs_output_dir": choices.published,
    "checkpoint_to": choices.checkpoint_to,
    "resume": "auto" if choices.resume else "never",
}
if choices.test_size:
    options["test_size"] = choices.test_size
if choices.mlflow_model_name:
    options["mlflow_model_name"] = choices.mlflow_model_name
# Any other option of the trainer is a line here, such as options["save_steps"] = 50
recipe = cells.choose_recipe(choices, options, ranks, machine)
print(cells.check_plan(options, recipe, ranks, machine, choices.gpu_family))

# COMMAND ----------

# MAGIC %md
# MAGIC ## Data and tokenizer
# MAGIC This process prepares the data, and the ranks load it from the cache. The ledger shows the number of rows used, and
# MAGIC why others are dropped. During training and again below, the model answers Dolly's five instructions and three
# MAGIC held-out rows.

# COMMAND ----------

from training.consts import SAMPLE_INSTRUCTIONS

prompts = [{"instruction": text, "input": "", "output": ""} for text in SAMPLE_INSTRUCTIONS]
prompts += cells.prepare_rows(recipe | options, 3)
options["sample_prompts"] = cells.write_prompts(choices, prompts)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Watch
# MAGIC TensorBoard shows the run once it has started. Press its reload button.

# COMMAND ----------

# MAGIC %load_ext tensorboard
# MAGIC %tensorboard --logdir "$tensorboard_logs"

# COMMAND ----------

# MAGIC %md
# MAGIC ## Train
# MAGIC Runs the same command as on a terminal, in separate processes. If training fails, the cell fails with the reason
# MAGIC and the last lines, and no later cell runs. If you interrupt the cell, training saves a checkpoint first.

# COMMAND ----------

from training.errors import OptionsError, RunRefusedError, TrainingFailedError
from training.launch.local import deepspeed_command, shell_command
from training.launch.restart import launch
from training.options.wording import NOTEBOOK, worded

try:
    if choices.num_nodes > 1:
        from training.launch.spark import launch_on_spark

        launch_on_spark(recipe | options, choices.num_nodes, num_gpus, not machine.is_cpu, NOTEBOOK)
    else:
        command = deepspeed_command(recipe | options, num_gpus)
        print(shell_command(command), flush=True)
        launch(command, num_gpus if machine.is_cpu else 0, NOTEBOOK, choices.restarts)
except OptionsError as error:  # the cluster cannot train
    raise RunRefusedError(worded(f"Cannot train:\n{error}", NOTEBOOK)) from error
except TrainingFailedError as error:
    error.add_note(cells.resume_advice(choices))
    raise

# COMMAND ----------

# MAGIC %md
# MAGIC ## How it went
# MAGIC The model is not trained on the held-out rows. It learns as long as their loss falls.

# COMMAND ----------

import io

from IPython.display import Image, display

from training.consts import METRICS_FILE, SAMPLES_FILE
from training.pictures import draw_run
from training.storage.metrics import read

record = cells.finished_record(choices)
picture = io.BytesIO()
title = f"{choices.name}: {choices.input_model} on {', '.join(choices.training_dataset)}"
draw_run(read(choices.output / METRICS_FILE), title, picture)
display(Image(picture.getvalue()))
print("held-out loss {before:.3f} before, {after:.3f} after".format(**record["held_out_loss"]))

# COMMAND ----------

# MAGIC %md
# MAGIC ## What it answers
# MAGIC Answers of the base model and the trained model, with Dolly's sampling, beside the answer in the dataset.

# COMMAND ----------

cells.finished_record(choices)
texts = [cells.shown_prompt(row) for row in prompts]
before = cells.generate_answers(choices.input_model, prompts)
after = cells.generate_answers(str(choices.output), prompts)
columns = zip(texts, before, after, [row["output"] for row in prompts], strict=True)
cells.Table(["instruction", "base model", "trained", "in the dataset"], list(columns))

# COMMAND ----------

# MAGIC %md
# MAGIC ## How the answers changed
# MAGIC Greedy answers to the same prompts, before training and after each epoch.

# COMMAND ----------

cells.finished_record(choices)
cells.answers_by_step(read(choices.output / SAMPLES_FILE))

# COMMAND ----------

# MAGIC %md
# MAGIC ## Where it is
# MAGIC `manifest.json` in the published folder lists the size and checksum of each file.

# COMMAND ----------

print(results.usage(choices))

# COMMAND ----------

# MAGIC %md
# MAGIC ## Is it better?
# MAGIC Base model and trained model on held-out rows, each figure with a 95% interval. More rows make the intervals
# MAGIC narrower and take longer; 0 leaves this out. The results are also in `evaluation.json`, in the run's folder.

# COMMAND ----------

rows_to_evaluate = 100
results.evaluation(choices, rows_to_evaluate)
