"""Merging networks by their Fisher matrices."""
