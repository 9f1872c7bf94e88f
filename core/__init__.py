"""The runtime: configs, checkpoints, layers, models, state, text and generation."""
