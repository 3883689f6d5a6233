"""`mygpt serve` beside llama.cpp's server: tokens a second, and the time between tokens."""
