"""Starting, watching and reporting runs; imports `pretrain.config.keys` and nothing that needs torch."""
