"""The checks: pure functions from the evidence to an answer, by what they look at: scores, the run, its artefacts."""
