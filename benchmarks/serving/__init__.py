"""`mygpt serve` compared with llama.cpp's server: tokens per second, and time between tokens."""
