"""What rewards look like before training."""
