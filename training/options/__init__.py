"""Options of the trainer: definition, command line, DeepSpeed JSON, validation."""
