"""Talking to a model in a scene, and turning what was said into data."""
