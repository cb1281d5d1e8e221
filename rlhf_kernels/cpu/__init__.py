"""The backend `cpu`: for each op the calls of its C++ kernels in csrc/cpu, under the names that reference/ defines."""
