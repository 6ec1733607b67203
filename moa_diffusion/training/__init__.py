"""Rollout after rollout: the loop, the trainers, and the update that an advantage becomes."""
