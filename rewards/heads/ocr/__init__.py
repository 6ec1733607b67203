"""Legibility of the text that a prompt quotes."""

__all__: list[str] = []  # heads are made by their names: rewards.create("ocr")
