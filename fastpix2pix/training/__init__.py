"""One training step: options, update rules, optimizers, capture, and how it is prepared for a device."""
