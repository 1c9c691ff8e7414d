"""The command line: one file per group of verbs; `app` is the table of contents."""
