"""Other formats and places: the hub cache, foreign checkpoints, verification."""
