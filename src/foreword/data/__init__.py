"""Rows: sources, template, labels, splits, token ids. No torch here."""
