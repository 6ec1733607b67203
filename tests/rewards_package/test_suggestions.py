"""The most similar of the known names is suggested."""

from __future__ import annotations

from rewards.suggestions import did_you_mean


def test_the_most_similar_name_is_asked_for():
    known = ["trainer", "tracker", "policy"]
    assert did_you_mean("trainr", known) == " Did you mean 'trainer'?"
    assert did_you_mean("POLICY", known) == " Did you mean 'policy'?"
    assert did_you_mean("xyz", known) == ""
    assert did_you_mean("xyz", []) == ""
