"""What one process is to the others, to the launcher and to the terminal."""
