"""Training: the step, its optimizers, and how it is run."""
