"""What to try, what to go on with, and which soft prompts to put together: no model is needed to decide it."""
