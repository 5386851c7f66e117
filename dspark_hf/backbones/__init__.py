"""Draft backbones, one module a model family: `DraftLayer`, `RMSNorm` and `RotaryEmbedding`."""
