"""Shapes of models by name, and what training them costs. Only formulas; torch is not imported."""
