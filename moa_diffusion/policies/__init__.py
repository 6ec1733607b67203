"""What is trained: policies sample, and give log-probabilities with gradient."""
