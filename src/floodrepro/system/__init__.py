"""The machine: benchmarks, and what they were measured on."""
