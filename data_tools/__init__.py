"""From text to packed shards: corpora, the shared tokenizer, packing."""
