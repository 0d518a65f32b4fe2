"""Many processes and devices: their start, their mesh, what ends them together."""
