"""How bytes travel between silos and aggregator."""
