"""The commands of the script for heads: list, check, score, serve."""
