"""Decoding: engines behind one interface, their choice, and text in and out."""
