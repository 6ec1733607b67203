"""The heads that come with the package."""

__all__: list[str] = []  # heads are made by their names: rewards.create("ocr")
