"""Federated pre-training: the silo's loop, the aggregator's loop, and what lies between them."""
