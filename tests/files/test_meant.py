"""The name that was meant."""

from __future__ import annotations

from moa_diffusion.files.meant import did_you_mean, nearest


def test_the_nearest_name_is_asked_for():
    known = ["trainer", "tracker", "policy"]
    assert nearest("trainr", known) == "trainer"
    assert did_you_mean("POLICY", known) == " Did you mean 'policy'?"
    assert nearest("xyz", known) is None
    assert did_you_mean("xyz", known) == ""
    assert did_you_mean("xyz", []) == ""
