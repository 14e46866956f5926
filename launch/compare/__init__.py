"""Models at equal tokens, and their table."""
