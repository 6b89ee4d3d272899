"""Where images come from, the store of their tokens, and the random numbers of training."""
