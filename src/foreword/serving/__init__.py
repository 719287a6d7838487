"""Many soft prompts over one frozen model: engines, and the gateway in front of them."""
