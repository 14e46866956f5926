"""Who takes part, what was agreed, and the record of what was done."""
