"""What runs the model: transformers' continuous batching, or vLLM."""
