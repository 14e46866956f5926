"""The configuration: its keys, how it is loaded, what it may say. Imports no torch."""
