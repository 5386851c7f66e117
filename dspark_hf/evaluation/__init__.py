"""Measuring heads: prompts, speed, and what the numbers are made of."""
