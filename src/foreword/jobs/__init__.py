"""What the verbs do: train, evaluate, load and predict, preview."""
