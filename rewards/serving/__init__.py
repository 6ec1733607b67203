"""Heads on another machine: what asks, what answers, what travels."""
