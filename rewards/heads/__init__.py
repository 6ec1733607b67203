"""The heads that come with the package."""
