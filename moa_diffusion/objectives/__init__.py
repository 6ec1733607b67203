"""From K rewards to one advantage per sample: normalizers and weightings.

Nothing here knows what a sample is, which model drew it, or how many processes there are.
"""
