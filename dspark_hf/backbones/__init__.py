"""Draft backbones, one module a model family."""
