"""First on PYTHONPATH for the processes that tests start: they see no MLflow and no bitsandbytes, as a user who installed
requirements.txt alone. DeepSpeed and peft import both wherever they are installed, which takes each process 4 seconds.

Tests that need them ask for the fixture `every_extra`.
"""

import sys

for name in ("mlflow", "bitsandbytes"):
    sys.modules[name] = None
