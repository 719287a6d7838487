"""The frozen model: loading, virtual tokens, packed forwards, generation."""
