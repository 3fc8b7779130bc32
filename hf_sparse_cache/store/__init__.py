"""What is kept, of all prompts, under one budget: tokens, positions and sizes. It knows no model and no torch."""

from .store import CheckpointStore as CheckpointStore
