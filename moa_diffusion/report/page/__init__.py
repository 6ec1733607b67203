"""``report.html``: one file that shows an evaluation and the runs behind it, without a network."""
