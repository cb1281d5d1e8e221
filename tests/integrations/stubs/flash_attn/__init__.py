"""Nothing that can be called: OpenRLHF's packing of samples needs flash-attn, and its imports ask for it."""
