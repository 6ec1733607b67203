"""The objectives inside other people's trainers."""
