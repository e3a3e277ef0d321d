"""Processes of a run: who is there, what they exchange, and what happens when one is lost."""
