"""The adapter folder (PEFT format and our sidecar) and the hub."""
