"""Which samples are drawn at which step: prompts, preferences, groups and seeds."""
