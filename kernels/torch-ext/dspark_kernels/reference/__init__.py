"""The same in torch: what the kernels are tested against, and what runs where they do not."""
