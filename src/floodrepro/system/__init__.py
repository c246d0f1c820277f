"""The machine: what it is, whether it can do what a recipe needs, and how fast it is."""
