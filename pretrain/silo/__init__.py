"""Inside one institution: engine, model, data, inner optimizer, checkpoints, evaluation."""
