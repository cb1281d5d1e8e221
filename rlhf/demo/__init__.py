"""The demo: the whole method on a small story model, with a simulated labeler."""
