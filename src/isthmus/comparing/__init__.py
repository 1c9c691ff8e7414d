"""Several joints on the same data under one budget: planned, trained, measured, judged and written down."""
