"""Measuring: chip tables of models, masks and baselines, and the scores and intervals that are computed from them."""
