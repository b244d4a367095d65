"""Training of the family: one loop (`loop`), its checkpoints, and the phases that use it."""
