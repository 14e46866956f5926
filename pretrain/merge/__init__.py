"""The aggregator's side of the outer step, for whoever merges."""
