"""Plain PyTorch definitions: what every backend must compute, for any dtype and device."""
