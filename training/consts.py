"""The prompt's words, the control tokens, and Dolly's defaults. Imports nothing.

The wording is Stanford Alpaca's, byte for byte: a model trained on other words would be another model.
"""

INTRO = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
INTRO_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)

INSTRUCTION_KEY = "### Instruction:"
INPUT_KEY = "### Input:"  # ordinary text, as in Dolly
RESPONSE_KEY = "### Response:\n"  # the newline belongs to the token
END_KEY = "### End"

# Added to the tokenizer in this order, so that GPT-J gives them the ids 50400, 50401 and 50402.
CONTROL_TOKENS = (END_KEY, INSTRUCTION_KEY, RESPONSE_KEY)

IGNORE_INDEX = -100  # torch's cross entropy skips targets of this value

DEFAULT_INPUT_MODEL = "EleutherAI/gpt-j-6B"
DEFAULT_TRAINING_DATASET = "tatsu-lab/alpaca"
DEFAULT_SEED = 42
DEFAULT_TEST_SIZE = 1000  # rows held out
DEFAULT_LEARNING_RATE = 1e-5

SAMPLE_TOKENS = 128  # longest answer of a model that is asked while it trains

RUN_FILE = "run.json"  # the record of a run, in its output folder

DEMO = "demo"  # the name of the embedded model and dataset, wherever a model or dataset is asked for

# What Databricks showed when it announced Dolly.
SAMPLE_INSTRUCTIONS = (
    "Write a love letter to Edgar Allan Poe.",
    "Write a tweet announcing Dolly, a large language model from Databricks.",
    "I'm selling my Nikon D-750, write a short blurb for my ad.",
    "Explain to me the difference between nuclear fission and fusion.",
    "Give me a list of 5 science fiction books I should read next.",
)
