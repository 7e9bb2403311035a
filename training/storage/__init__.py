"""Files of a run: its record, metrics, checkpoints, the published copy."""
