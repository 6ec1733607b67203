"""What a run leaves on disk: log, checkpoints, and which of them stay."""
