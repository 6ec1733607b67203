"""What watches a run: held-out evaluation, drift, alarms."""
