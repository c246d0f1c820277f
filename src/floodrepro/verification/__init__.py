"""The battery: what is claimed of a run, each claim with its figure, threshold and evidence. Needs no torch."""
