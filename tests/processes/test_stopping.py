"""Requests to stop a run: a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal

import pytest

from moa_diffusion.processes.stopping import StopRequest


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    """Unless it is the same press, which a launcher passes on as well."""
    now = [100.0]
    monkeypatch.setattr("moa_diffusion.processes.stopping.time.monotonic", lambda: now[0])
    stop = StopRequest(announce=False)
    stop.ask(signal.SIGTERM)
    stop.ask(signal.SIGINT)
    now[0] += 30
    stop.ask(signal.SIGTERM)
    assert stop.number == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        stop.ask(signal.SIGINT)
