"""Soft prompts before they are trained: initialisers."""
