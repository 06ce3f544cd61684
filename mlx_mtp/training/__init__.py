"""Training of a drafter: data, losses, and the training loop."""
