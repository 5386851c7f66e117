"""Training of draft heads: blocks and masks, losses, data, trainer."""
