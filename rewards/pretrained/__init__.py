"""Models that others have trained: found, read strictly, fed."""
