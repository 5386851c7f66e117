"""How many drafts to verify: survival, Algorithm 1 of the paper, step costs and load."""
