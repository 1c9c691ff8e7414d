"""Published metrics as functions of predictions and references; no model, no file."""
