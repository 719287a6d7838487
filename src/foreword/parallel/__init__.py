"""Several processes that train one soft prompt: how they share the work, and what they tell each other."""
