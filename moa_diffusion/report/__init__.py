"""What an evaluation says: tables, pictures, the page."""
