"""The commands of the script for heads: list, check, score, serve."""

from rewards.commands.check_head import Checked, Unusable, try_head

__all__ = ["Checked", "Unusable", "try_head"]
