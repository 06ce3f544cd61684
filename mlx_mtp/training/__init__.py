"""Training a drafter: data, losses, and the loop."""
