# Databricks notebook source
# MAGIC %md
# MAGIC # Train Dolly
# MAGIC GPT-J-6B learns to follow instructions from Stanford Alpaca, under DeepSpeed ZeRO-3. Choose the family of your GPUs
# MAGIC above, press **Run All**, and come back to a model and its answers. With `cpu` a small model learns the embedded
# MAGIC demo, on any machine, in a few minutes.
# MAGIC
# MAGIC For research only: Stanford Alpaca is CC BY-NC 4.0.

# COMMAND ----------

# MAGIC %md
# MAGIC ## Install
# MAGIC Installs the tested versions, except those that the environment already has.

# COMMAND ----------

# MAGIC %pip install --quiet --disable-pip-version-check -r ../requirements.txt

# COMMAND ----------

# Databricks has imported other versions of some of them; a Jupyter kernel that has just started has not.
if "dbutils" in globals():
    dbutils.library.restartPython()

# COMMAND ----------

# MAGIC %md
# MAGIC ## What to train
# MAGIC The defaults are Dolly's run; an empty field means what stands in brackets. On Databricks these are fields at the
# MAGIC top of the page. Elsewhere `--set` gives them, or change the defaults here.

# COMMAND ----------

import sys
from pathlib import Path

# Databricks and Jupyter start in the notebook's folder, which is inside the repository.
here = Path.cwd()
sys.path.insert(0, str(next(folder for folder in [here, *here.parents] if (folder / "training").is_dir())))

from notebooks import cells
from training import notebook
from training.machine.catalogue import FAMILIES
from training.plan.presets import preset_options

if "dbutils" not in globals():
    dbutils = notebook.StandIn()

dbutils.widgets.dropdown("gpu_family", "a100", list(FAMILIES), "GPU family (cpu: the demo)")
dbutils.widgets.text("num_gpus", "", "GPUs of each node (all)")
dbutils.widgets.text("num_nodes", "1", "Nodes")
dbutils.widgets.text("input_model", "", "Base model (EleutherAI/gpt-j-6B; cpu: demo)")
dbutils.widgets.text("training_dataset", "", "Dataset (tatsu-lab/alpaca; cpu: demo)")
dbutils.widgets.text("epochs", "", "Epochs (1; demo: 6)")
dbutils.widgets.text(
    "local_training_root", cells.default_training_root(), "Folder of the runs, on a local disk"
)
dbutils.widgets.text(
    "dbfs_output_root", cells.default_output_root(), "Folder of the models: DBFS, a Volume, s3://"
)
dbutils.widgets.text("resume", "", "Go on with the run named (a new run)")
dbutils.widgets.text("mlflow_model_name", "", "Register in MLflow as (no MLflow)")

# COMMAND ----------

# MAGIC %md
# MAGIC ## The run and its place
# MAGIC A run is trained on a local disk, where files can be changed, and copied when it has finished. Its name is that of
# MAGIC both folders, and what to type into `resume` should it be stopped.

# COMMAND ----------

chosen = cells.read_widgets(dbutils.widgets)
tensorboard_logs = str(chosen.output / "runs")
print(f"{chosen.name}\n  trained in       {chosen.output}\n  published to     {chosen.published}")

# COMMAND ----------

# MAGIC %md
# MAGIC ## Does it fit?
# MAGIC The options follow from the GPU family, and a step has 64 rows on any number of devices. The plan says whether that
# MAGIC fits in memory and on disk, and how long it takes, before anything is paid for.

# COMMAND ----------

from training.plan.presets import DEMO_RECIPE

machine = cells.find_machine(chosen)
num_gpus = machine.count
ranks = num_gpus * chosen.num_nodes
recipe = preset_options(chosen.gpu_family, ranks)
options = {
    "input_model": chosen.input_model,
    "training_dataset": chosen.training_dataset,
    **(DEMO_RECIPE if chosen.is_demo else {}),
    "epochs": chosen.epochs,
    "local_output_dir": str(chosen.output),
    "dbfs_output_dir": chosen.published,
    "resume": "auto" if chosen.resume else "never",
}
if chosen.mlflow_model_name:
    options["mlflow_model_name"] = chosen.mlflow_model_name
print(cells.check_plan(options, recipe, ranks, machine, chosen.gpu_family))

# COMMAND ----------

# MAGIC %md
# MAGIC ## Data and tokenizer
# MAGIC One process prepares them, so that the ranks find them in the cache and none waits for another. The ledger says what
# MAGIC became of every row. While it trains, and again below, the model answers Dolly's five instructions and three of the
# MAGIC rows that it does not train on.

# COMMAND ----------

from training.consts import DEFAULT_TEST_SIZE, SAMPLE_INSTRUCTIONS
from training.data.tokens import prepare_dataset
from training.model.loading import load_config, max_positions
from training.model.tokenizer import load_tokenizer

longest = max_positions(load_config(chosen.input_model))
rows, ledger = prepare_dataset(chosen.training_dataset, load_tokenizer(chosen.input_model), longest)
print(ledger)

prompts = [{"instruction": each, "input": "", "output": ""} for each in SAMPLE_INSTRUCTIONS]
test_size = options.get("test_size", DEFAULT_TEST_SIZE)
prompts += cells.held_out_rows(chosen.training_dataset, rows, test_size, 3)
options["sample_prompts"] = cells.write_prompts(chosen, prompts)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Watch
# MAGIC TensorBoard follows the run once it has started; press its reload button.

# COMMAND ----------

# MAGIC %load_ext tensorboard
# MAGIC %tensorboard --logdir "$tensorboard_logs"

# COMMAND ----------

# MAGIC %md
# MAGIC ## Train
# MAGIC The same command as on a terminal, in processes of its own. If it fails this cell fails, with the reason and the last
# MAGIC lines, and no cell below runs. Interrupting the cell saves a checkpoint first.

# COMMAND ----------

from training.errors import OptionsError, RunRefusedError, TrainingFailedError
from training.launch.local import deepspeed_command, launch, shell_command

try:
    if chosen.num_nodes > 1:
        from training.launch.spark import launch_on_spark

        launch_on_spark(options | recipe, chosen.num_nodes, num_gpus, use_gpu=not machine.is_cpu)
    else:
        command = deepspeed_command(options | recipe, num_gpus)
        print(shell_command(command), flush=True)
        launch(command, cpu_ranks=num_gpus if machine.is_cpu else 0)
except OptionsError as error:  # of a cluster that cannot train
    raise RunRefusedError(f"Cannot train:\n{error}") from error
except TrainingFailedError as error:
    error.add_note(cells.how_to_go_on(chosen))
    raise

# COMMAND ----------

# MAGIC %md
# MAGIC ## How it went
# MAGIC The held-out rows are those that it was never trained on: while their loss falls, it learns.

# COMMAND ----------

import io

from IPython.display import Image, display

from training.consts import METRICS_FILE, SAMPLES_FILE
from training.pictures import draw_run
from training.storage.metrics import read

record = cells.finished_record(chosen)
picture = io.BytesIO()
title = f"{chosen.name}: {chosen.input_model} on {chosen.training_dataset}"
draw_run(read(chosen.output / METRICS_FILE), title, picture)
display(Image(picture.getvalue()))
print("held-out loss {before:.3f} before, {after:.3f} after".format(**record["held_out_loss"]))

# COMMAND ----------

# MAGIC %md
# MAGIC ## What it answers
# MAGIC The base model and the trained one, sampled as Dolly was, beside the answer that the dataset has.

# COMMAND ----------

cells.finished_record(chosen)
questions = [f"{row['instruction']}\n{row['input']}".strip() for row in prompts]
before = cells.answers(chosen.input_model, prompts)
after = cells.answers(str(chosen.output), prompts)
columns = zip(questions, before, after, [row["output"] for row in prompts], strict=True)
cells.Table(["instruction", "base model", "trained", "in the dataset"], list(columns))

# COMMAND ----------

# MAGIC %md
# MAGIC ## How the answers changed
# MAGIC The likeliest answer to the same instructions, before training and after each epoch.

# COMMAND ----------

cells.finished_record(chosen)
cells.answer_stages(read(chosen.output / SAMPLES_FILE))

# COMMAND ----------

# MAGIC %md
# MAGIC ## Where it is
# MAGIC In the published folder `manifest.json` has the size and checksum of each file.

# COMMAND ----------

cells.finished_record(chosen)
published = chosen.published or "nowhere, as dbfs_output_root is empty"
folder = chosen.output if "://" in published or not chosen.published else chosen.published
print(f"""The model is in     {chosen.output}
and published to    {published}

from training.generate import generate_response, load_model_tokenizer_for_generate

model, tokenizer = load_model_tokenizer_for_generate("{folder}")
generate_response("Name three colours.", model=model, tokenizer=tokenizer)

or without this repository:

from transformers import pipeline

ask = pipeline("text-generation", model="{folder}")
ask([{{"role": "user", "content": "Name three colours."}}])""")
