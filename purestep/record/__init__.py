"""The record of a run: what it computed, looked at again and compared."""
