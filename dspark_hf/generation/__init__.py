"""Decoding with a draft head: the hook into transformers, the rounds, and what they are made of."""
