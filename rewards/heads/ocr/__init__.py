"""Legibility of the text that a prompt quotes."""
