"""Whole scenes to flood maps: plan a scene, check it, map it in bounded memory, compare the map with a truth."""
