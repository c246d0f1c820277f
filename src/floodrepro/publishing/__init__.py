"""What leaves the run folder: a pair of files that plain TerraTorch loads."""
