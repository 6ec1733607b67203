"""DeQA-Score in native torch modules: sizes, eye, language model and the head ``deqa``."""
