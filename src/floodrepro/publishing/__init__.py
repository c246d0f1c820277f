"""What leaves the run folder: a pair of files that plain TerraTorch loads, its card, and the upload."""
