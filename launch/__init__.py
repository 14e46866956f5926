"""Starting, watching and reporting runs; imports `pretrain.config` and nothing that needs torch."""
