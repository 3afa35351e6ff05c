"""Training: one loop, its optimizers, schedules and checkpoints."""
