"""One paper, one file. Files here never import each other; shared pieces live in `connectors` and `objectives`."""
