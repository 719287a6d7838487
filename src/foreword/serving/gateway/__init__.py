"""The gateway: an HTTP API in OpenAI's words, in front of an engine."""
