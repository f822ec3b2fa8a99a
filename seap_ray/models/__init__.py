"""Models: checkpoints and corpora on disk, and a model's forward pass with its statistics."""
