"""A checkpoint as a folder that others load."""
