"""Training: state, step, loop, mesh, checkpoints, optimizers, metric writers."""
