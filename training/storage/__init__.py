"""Files that a run writes: record, metrics, checkpoints, and the published copy of the model."""
