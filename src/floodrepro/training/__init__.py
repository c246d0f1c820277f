"""TerraTorch's own command-line class driven from Python, and what surrounds a fit."""
