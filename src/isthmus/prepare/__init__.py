"""Data work that needs models: the feature cache."""
