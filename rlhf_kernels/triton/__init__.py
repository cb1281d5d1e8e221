"""The triton backend: kernels and launchers, a file an op; what the functions mean stands in reference/<op>.py."""
