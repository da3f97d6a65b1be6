"""Generations as channels: one, many, and what only reads. They know a Core, and no Llama."""
