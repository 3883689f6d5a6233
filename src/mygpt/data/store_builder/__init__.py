"""How a token store is written: `build.py` leads, the others each do one thing for it."""
