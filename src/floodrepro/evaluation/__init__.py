"""From predictions to figures: confusion counts, scores and the baselines beside which a model is read."""
