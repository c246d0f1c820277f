"""The battery: what is claimed of a run, each claim with its figure and evidence. Only `measure` needs torch."""
