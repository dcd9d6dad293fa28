"""Plates: drawn, degraded, read from folders, packed, augmented and batched."""
