"""The command line: one file a verb; each imports its work only when it runs."""
