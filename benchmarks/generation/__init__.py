"""Generation side by side: our engines and other programs, on the same random weights."""
