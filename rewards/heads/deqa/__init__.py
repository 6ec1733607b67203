"""DeQA-Score in native torch modules: sizes, eye, language model and the head ``deqa``."""

__all__: list[str] = []  # heads are made by their names: rewards.create("ocr")
