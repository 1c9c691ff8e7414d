"""The gap between what a model makes of pictures and of the words for them, layer by layer."""
