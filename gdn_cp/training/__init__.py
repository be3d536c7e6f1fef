"""What the training scripts share: data, presets, loop, metrics, checkpoints."""
