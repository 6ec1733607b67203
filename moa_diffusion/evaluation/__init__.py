"""What people look at: pictures of runs."""
