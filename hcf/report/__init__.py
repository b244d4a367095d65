"""What a run shows a person: a self-contained page, a grid of images, a model card, a table."""
