"""Where checkpoints go: numbers in, positions out. It knows no store and no model."""
