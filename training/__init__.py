"""Fine-tunes a causal language model to follow instructions."""

import logging

# transformers imports bitsandbytes where it is installed, which then warns of a kernel that it could download for a CPU.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
