"""Methods: what is trained, one a file, its paper on top. Calling a method gives the soft prompt's values."""
