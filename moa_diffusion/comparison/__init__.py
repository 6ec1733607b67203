"""Methods against each other: runs, results, pictures."""
