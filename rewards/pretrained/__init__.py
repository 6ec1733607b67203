"""Models that others have trained: located, read strictly, fed."""
