"""A silo's own practice: its model tries its tasks, its verifier says what was right, and that becomes shards."""
