"""Tasks, scores and reports."""
