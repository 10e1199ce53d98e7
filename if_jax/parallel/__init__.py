"""Devices as a mesh, and the rules that place arrays on it."""
