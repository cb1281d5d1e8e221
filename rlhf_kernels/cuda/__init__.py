"""The cuda backend: calls of csrc/cuda's launchers; what the functions mean stands in reference/<op>.py."""
