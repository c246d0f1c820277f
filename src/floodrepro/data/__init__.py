"""Everything that touches ImpactMesh-Flood's files: names and splits, chips, generated data."""
