"""What a run looked like: its numbers, its health, and report.html with them."""
