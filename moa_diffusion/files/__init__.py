"""Files and places as their writer meant them; what is written is whole or not there."""
