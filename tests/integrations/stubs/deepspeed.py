"""Nothing: OpenRLHF imports deepspeed where its losses are, and calls it only to train."""
