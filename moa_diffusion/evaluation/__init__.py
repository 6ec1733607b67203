"""Models on the same prompts and seeds: drawn, scored, kept, each output and score once."""
